"""What parsers read of a model's configuration, without vLLM's ModelConfig, which inspects the model's code too."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class ModelFacts:
    """The attributes of vLLM's ModelConfig that its parsers read (0.32).

    Attributes
    ----------
    hf_config, hf_text_config
        `model_type` decides the form of tool call ids (renderers/chat_utils.py, `get_tool_call_id_type`).
    architecture
        Chooses the grammar of Cohere's models (parser/cohere_command.py).
    """

    def __init__(self, folder: Path) -> None:
        read: dict[str, Any] = json.loads((folder / "config.json").read_text())
        text = read.get("text_config") or read
        self.hf_config = SimpleNamespace(model_type=read.get("model_type"))
        self.hf_text_config = SimpleNamespace(model_type=text.get("model_type"))
        self.hf_overrides: dict[str, Any] = {}
        self.architecture: str | None = (read.get("architectures") or [None])[0]

    @property
    def harmony(self) -> bool:
        """Whether the model speaks OpenAI's Harmony format (gpt-oss)."""
        return bool(self.hf_config.model_type == "gpt_oss")
