"""Sampling parameters of requests that set none: the model's, and the operator's."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ares.gateway.openai.generation_defaults import GenerationConfigError, GenerationDefaults, load

OWN = {"temperature": 0.6, "top_k": 50, "top_p": 1.0, "max_new_tokens": 40, "eos_token_id": 2, "do_sample": True}
OVERRIDE = {"temperature": 0.1, "presence_penalty": 0.5, "max_new_tokens": 5}


def folder(path: Path, config: dict[str, Any] | None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config is not None:
        (path / "generation_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("override", [{}, OVERRIDE])
@pytest.mark.parametrize("source", ["auto", "vllm", "other"])
@pytest.mark.parametrize("config", [OWN, {"eos_token_id": 2}, None])
def test_they_are_those_of_vllm(
    tmp_path: Path, source: str, config: dict[str, Any] | None, override: dict[str, Any]
) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: the cpu or vllm extra")
    from vllm.config import ModelConfig
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

    model = folder(tmp_path / "model", config)
    if source == "other":
        source = str(folder(tmp_path / "other", {"min_p": 0.1, "max_new_tokens": 7}))
    settings: Any = SimpleNamespace(
        generation_config=source,
        override_generation_config=override,
        hf_config_path=None,
        model=str(model),
        trust_remote_code=False,
        revision=None,
        _hf_config_revision=None,
        code_revision=None,
        config_format="auto",
        hf_token=None,
    )
    settings.try_get_generation_config = lambda: ModelConfig.try_get_generation_config(settings)
    wanted = ModelConfig.get_diff_sampling_param(settings)
    # As in entrypoints/openai/chat_completion/serving.py.
    cap = wanted.get("max_tokens") if source not in ("auto", "vllm") else override.get("max_new_tokens")
    made = load(model, source, override)
    assert made.parameters == {name: value for name, value in wanted.items() if name != "max_tokens"}
    for asked in (None, 3, 30):
        assert made.limit(asked, 100) == get_max_tokens(100, asked, 0, wanted, cap)


def test_limits() -> None:
    assert GenerationDefaults().limit(None, 90) == 90
    assert GenerationDefaults(maximum_tokens=40).limit(None, 90) == 40
    assert GenerationDefaults(maximum_tokens=40).limit(80, 90) == 80
    assert GenerationDefaults(maximum_tokens=40, cap=5).limit(80, 90) == 5


def test_a_folder_without_a_generation_config(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", OWN)
    with pytest.raises(GenerationConfigError, match="nothing"):
        load(model, str(tmp_path / "nothing"))
