"""Requests that are answered otherwise than by vLLM, each with the reason."""

_OUTPUT_ONLY = "refused by name: log probabilities are given for the output only"

REASONS = {
    "logprobs/logprobs of given ids": "refused by name: with it, vLLM changes the log probabilities of a whole batch",
    "logprobs/logprobs of the prompt": _OUTPUT_ONLY,
    "logprobs/echo with logprobs": _OUTPUT_ONLY,
    "logprobs/too many logprobs": "the error names the field with the number, top_logprobs",
    "prompts/too long": "the error names the field, prompt",
    "prompts/no token left": "the error names the field that is too long, prompt",
    "prompts/best_of": "refused by name: vLLM takes it and makes one choice",
    "prompts/echo, stream": "vLLM adds the prompt's token ids, which are not asked for",
    "tokens/unknown tokens": "refused: there are no such tokens",
    "responses/too long": "the error names the field, input",
    "anthropic/no limit": "the error is in Anthropic's form, which names no field",
    "tools/reasoning not shown": "refused by name: without a reasoning parser it has no effect",
    "messages/echo of a chat": "refused by name",
    "messages/null content": "null is absent, in every field",
    "tools/null choice": "null is absent, in every field: vLLM then leaves a call in the text",
    "messages/plain texts as parts": "vLLM's chat templates take them, its check of requests does not",
}

# These differ only where the model does what they are about: here, where it calls a tool.
SOMETIMES = {"tools/null choice"}
