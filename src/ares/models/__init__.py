"""Models: from what a user names to a folder that vLLM and a tokenizer can load."""
