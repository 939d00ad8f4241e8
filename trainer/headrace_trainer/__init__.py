"""What runs in the pods: an agent that supervises, and one room for each stage kind.

``agent`` starts ``stage``, which gives a ``StageContext`` to the room of the stage's kind and commits what it leaves.
"""
