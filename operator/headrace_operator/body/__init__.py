"""How decisions meet a cluster: watch, observe from caches, plan, apply."""
