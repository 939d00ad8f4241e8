"""Rules that judge an answer's text: ``judging`` carries them out, ``sandbox`` and ``confined`` run code that a model wrote.

Stages share them: rewards of ``rl``, and what the principles of ``constitutional`` forbid.
"""

from headrace_trainer.rules.judging import Columns, Verdict, check_columns, check_rule, judge

__all__ = ["Columns", "Verdict", "check_columns", "check_rule", "judge"]
