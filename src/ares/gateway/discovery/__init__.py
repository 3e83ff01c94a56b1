"""Instances that come and go: sources that name them, and their merging into the pool (docs/discovery.md)."""
