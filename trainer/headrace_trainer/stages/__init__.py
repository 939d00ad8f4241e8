"""One package a stage kind, named as the kind; each has ``run(ctx)``. A stage never imports another stage."""
