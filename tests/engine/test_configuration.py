"""What an engine reports of its settings."""

from types import SimpleNamespace
from typing import Any

import pytest

from ares.engine import configuration


def config(**changes: Any) -> Any:
    transfer = SimpleNamespace(get_from_extra_config=lambda name, default: changes.get("backends", default))
    return SimpleNamespace(
        use_v2_model_runner=changes.get("v2", True),
        scheduler_config=SimpleNamespace(async_scheduling=changes.get("asynchronous", True)),
        model_config=SimpleNamespace(dtype="torch.bfloat16", quantization=changes.get("quantization")),
        cache_config=SimpleNamespace(cache_dtype="fp8"),
        speculative_config=changes.get("speculative"),
        lora_config=changes.get("lora"),
        kv_transfer_config=transfer,
        device_config=SimpleNamespace(device_type="cuda"),
    )


def test_the_settings_that_a_check_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UCX_TLS", "VLLM_BATCH_INVARIANT", "VLLM_SERVER_DEV_MODE"):
        monkeypatch.delenv(name, raising=False)
    found = configuration.describe(config(), predicts=False)
    assert found.pop("rdma_devices") == ",".join(configuration.rdma_devices())
    assert found == {
        "model_runner": "V2",
        "scheduling": "asynchronous",
        "dtype": "bfloat16",
        "kv_cache_dtype": "fp8",
        "quantization": "none",
        "speculative_decoding": "off",
        "lora": "off",
        "batch_invariant": "off",
        "predictor": "off",
        "development_mode": "off",
        "device": "cuda",
        "nixl_backends": "UCX",
        "ucx_tls": "",
    }


def test_what_else_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setenv("UCX_TLS", "rc,cuda_ipc")
    other = {"v2": False, "asynchronous": False, "quantization": "fp8", "lora": object(), "backends": ["UCX", "GDS"]}
    found = configuration.describe(config(speculative=SimpleNamespace(method="eagle"), **other), predicts=True)
    expected = {"model_runner": "V1", "scheduling": "synchronous", "quantization": "fp8", "lora": "on"}
    expected |= {"speculative_decoding": "eagle", "batch_invariant": "on", "predictor": "on"}
    expected |= {"nixl_backends": "UCX,GDS", "ucx_tls": "rc,cuda_ipc"}
    assert {name: found[name] for name in expected} == expected


def test_versions_of_what_is_installed() -> None:
    found = configuration.versions("msgspec", "no-such-package-of-ours")
    assert list(found) == ["msgspec"]
    assert found["msgspec"][0].isdigit()
