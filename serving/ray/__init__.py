"""Serving on a Ray cluster: gateways that speak HTTP, and engines, each a deployment's replicas."""
