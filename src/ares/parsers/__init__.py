"""vLLM's parsers of reasoning and tool calls, for the gateway (gateway/openai/parsing.py)."""
