"""What runs in or right around vLLM: the only room that imports it."""
