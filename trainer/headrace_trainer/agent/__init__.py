"""One supervisor per pod: starts the ranks, watches them, forwards stop requests and writes the outcome."""
