"""Instances: discovery, health, the channels to them."""
