"""vLLM's limits on one request, by vLLM's own variables (envs.py, 0.32): gateway and instances read the same ones."""

import os


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default  # an instance refuses to start with anything else


MAXIMUM_STOP_STRINGS = _variable("VLLM_MAX_STOP_STRINGS", 4)
MAXIMUM_CHOICES = _variable("VLLM_MAX_N_SEQUENCES", 16384)
MAXIMUM_PROMPTS = _variable("VLLM_MAX_COMPLETION_PROMPTS", 1024)
# With more, a worker with vLLM's V2 runner raises an error that ends its engine, and that of every instance which the
# request then goes to (v1/worker/gpu/sample/bad_words.py, logit_bias.py; 0.32).
MAXIMUM_BAD_WORDS = _variable("VLLM_MAX_NUM_BAD_WORDS", 128)
MAXIMUM_BAD_WORD_TOKENS = _variable("VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", 1024)
MAXIMUM_BIASED_TOKENS = 1024
# Of 128 stop tokens the model's own take some.
MAXIMUM_STOP_TOKENS = 120
