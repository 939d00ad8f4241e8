"""One supervisor a pod: it starts the ranks, watches them, passes signals on, and says how it ended."""
