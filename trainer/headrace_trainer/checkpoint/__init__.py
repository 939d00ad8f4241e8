"""Checkpoints: ``state`` writes and reads folders, ``vault`` commits them to storage, ``manifest`` says what is in one."""
