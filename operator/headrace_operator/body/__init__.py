"""The cluster body: watch, observe from caches, plan, apply."""
