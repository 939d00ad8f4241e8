"""``headrace``: the command line, and the local body, which runs a manifest without a cluster."""
