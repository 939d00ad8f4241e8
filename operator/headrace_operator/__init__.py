"""The control plane: a pure planner (``brain``), and the body that carries its plans out in a cluster."""
