"""Our log lines in an instance's processes: where and as vLLM writes its own."""

import logging


def follow_vllm() -> None:
    """Hand our log records to vLLM's handlers, at its level.

    vLLM sets up the logger `vllm` alone, and again when it knows its arguments (logger.py, vLLM 0.32): without this,
    all of ours below a warning is dropped. Where VLLM_LOGGING_CONFIG_PATH sets up our loggers, nothing is changed.
    """
    ours = logging.getLogger("ares")
    if not ours.handlers:
        ours.parent = logging.getLogger("vllm")
