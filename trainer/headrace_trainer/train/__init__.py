"""The pretrain stage: ``run`` builds the parts, ``loop`` goes through the steps."""

from headrace_trainer.train.pretrain import run

__all__ = ["run"]
