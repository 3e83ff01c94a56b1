"""Profiles of engines, one JSON file each."""
