"""What runs in the pods: an agent that supervises, and one package for each stage kind.

``agent`` starts ``stage``, which gives a ``StageContext`` to the package of the stage's kind and commits what it leaves.
"""
