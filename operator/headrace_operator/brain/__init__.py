"""What should happen to a run: pure decisions, which the operator and ``headrace run`` share. No I/O, no clock."""
