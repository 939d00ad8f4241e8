"""The contract shared by all components: spec, status, artifacts, faults and planning arithmetic.

No torch, kopf or boto3: the command line, the operator and the trainer all parse the same classes.
"""

GROUP = "headrace.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
