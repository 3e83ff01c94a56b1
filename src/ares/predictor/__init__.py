"""Remaining-length models: data, training, evaluation, checkpoints, inference. No vLLM here."""
