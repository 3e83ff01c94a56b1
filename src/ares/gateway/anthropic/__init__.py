"""Anthropic's `/v1/messages`: requests, replies and their events."""
