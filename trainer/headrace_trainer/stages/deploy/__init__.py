"""The deploy stage: an exported model -> an OpenAI-compatible server that has answered a completion.

``port`` and ``place`` decide where it listens, ``hub`` names the model, ``command`` builds the command line, ``engine``
is the child process, ``client`` queries it; ``stage`` runs them in order. ``ready`` is the pod's readiness probe: it
imports this package, so nothing heavy may be imported here.
"""

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from headrace_trainer.stage import StageContext


def run(ctx: "StageContext") -> NoReturn:
    """Serve the model of ``ctx.input("model")`` until asked to stop.

    Raises:
        Stopped: the server was asked to stop, and has.
        EngineFailed: the server died or does not answer.
        UserError: the engine is not installed, or no port is free.
    """
    from headrace_trainer.stages.deploy.stage import run_deploy

    run_deploy(ctx)
