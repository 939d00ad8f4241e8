"""One package per stage kind, named after it; each has ``run(ctx)``. A stage never imports another stage."""
