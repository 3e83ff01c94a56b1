"""OpenAI's API: requests, chat templates, text, replies."""
