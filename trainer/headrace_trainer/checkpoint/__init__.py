"""Checkpoints: ``state`` writes and reads folders, ``shelf`` is storage, ``vault`` is the gang; ``manifest`` says what is in one."""
