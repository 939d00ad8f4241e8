"""Where the ``headrace`` command begins: Ctrl-C while modules are loaded ends it without a word."""

import signal


def main() -> None:
    """Load the commands, then run the one that was asked for."""
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if by_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from headrace_cli.main import main as run

    if by_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
