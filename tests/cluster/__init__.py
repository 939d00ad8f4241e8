"""A real Kubernetes cluster on one bare Linux machine: see README.md."""
