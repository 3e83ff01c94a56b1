"""An application of Ray Serve: instances in placement groups, and the gateway as its ingress (docs/ray.md)."""
