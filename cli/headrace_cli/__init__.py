"""``headrace``: the command line, and the local body that runs a manifest without a cluster."""
