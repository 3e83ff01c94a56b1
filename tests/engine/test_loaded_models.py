"""What an instance refuses to load, from vLLM's own arguments."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ares.engine.loaded_models import unsupported


def settings(folder: Path, *, adapters: int = 0, slots: int = 1, connector: Any = "ours", **config: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    modules = [SimpleNamespace(name=f"adapter-{n}") for n in range(adapters)] or None
    return SimpleNamespace(model=str(folder), lora_modules=modules, max_loras=slots, kv_transfer_config=connector)


@pytest.mark.parametrize("nested", [False, True])
def test_convolutions_are_refused(tmp_path: Path, nested: bool) -> None:
    """vLLM's connector raises an error for them only when the model has been loaded."""
    config = {"layer_types": ["conv", "full_attention"]}
    given = {"text_config": config} if nested else config
    assert "serve it with `vllm serve`" in (unsupported(settings(tmp_path, **given), on_cpu=False) or "")
    assert unsupported(settings(tmp_path, connector=None, **given), on_cpu=False) is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": None},
        {"layer_types": 3},
        {"text_config": "none"},
    ],
)
def test_other_models_are_not(tmp_path: Path, config: dict[str, Any]) -> None:
    assert unsupported(settings(tmp_path, **config), on_cpu=True) is None


def test_a_model_without_a_configuration_is_left_to_vllm() -> None:
    given = SimpleNamespace(model="/no/such", lora_modules=None, max_loras=1, kv_transfer_config="ours")
    assert unsupported(given, on_cpu=True) is None


@pytest.mark.parametrize(("adapters", "slots", "refused"), [(1, 1, True), (2, 2, True), (2, 3, False), (0, 1, False)])
def test_on_a_cpu_one_slot_stays_without_an_adapter(tmp_path: Path, adapters: int, slots: int, refused: bool) -> None:
    """Found with real engines: beside requests with adapters, those without one had wrong tokens, moved or not."""
    given = settings(tmp_path, adapters=adapters, slots=slots)
    reason = unsupported(given, on_cpu=True)
    assert (reason is not None) == refused
    if reason is not None:
        assert f"with --max-loras {adapters + 1}" in reason
    assert unsupported(given, on_cpu=False) is None


@pytest.mark.parametrize("config", [{"kv_lora_rank": 512}, {"text_config": {"kv_lora_rank": 16}}])
def test_latent_attention_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    reason = unsupported(settings(tmp_path, **config), on_cpu=False)
    assert reason is not None
    assert "MLA" in reason
