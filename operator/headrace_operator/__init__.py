"""The control plane. ``observe`` -> ``plan`` -> a body that carries the plan out: ``apply`` in a cluster, or the
command line's local body.
"""
