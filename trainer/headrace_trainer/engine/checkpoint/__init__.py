"""Checkpoints: ``state`` writes and reads folders, ``store`` is what lies in storage, ``checkpointer`` makes
a gang save and resume; ``manifest`` says what is in one."""
