"""OpenAI's `/v1/responses`: requests, replies and their events."""
