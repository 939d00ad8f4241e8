"""What runs in the pods: a supervising agent, and one package per stage kind.

``agent`` starts ``stage``, which passes a ``StageContext`` to the stage's package and commits its output.
"""
