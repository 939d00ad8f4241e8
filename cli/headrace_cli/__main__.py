"""Entry point of the ``headrace`` command. Ctrl-C during imports exits silently."""

import signal


def main() -> None:
    """Import the commands, then run the one asked for."""
    by_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if by_default:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from headrace_cli.main import main as run

    if by_default:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
