"""Pure decisions about a run, shared by the operator and ``headrace run``. No I/O, no clock."""
