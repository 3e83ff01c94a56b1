"""What an engine reports of its settings."""

from types import SimpleNamespace
from typing import Any

import pytest

from ares.engine import configuration


def config(**changes: Any) -> Any:
    model = {
        "model": "/no/such",
        "hf_config_path": None,
        "hf_overrides": {},
        "dtype": "torch.bfloat16",
        "quantization": changes.get("quantization"),
        "quantization_config": changes.get("quantization_config"),
        "disable_sliding_window": changes.get("disable_sliding_window", False),
        "use_fp64_gumbel": changes.get("fp64", False),
    }
    transfer = SimpleNamespace(get_from_extra_config=lambda name, default: changes.get("backends", default))
    return SimpleNamespace(
        use_v2_model_runner=changes.get("v2", True),
        scheduler_config=SimpleNamespace(async_scheduling=changes.get("asynchronous", True)),
        model_config=SimpleNamespace(**model),
        load_config=SimpleNamespace(load_format=changes.get("load_format", "auto")),
        cache_config=SimpleNamespace(
            cache_dtype="fp8",
            kv_cache_dtype_skip_layers=changes.get("skipped", []),
            mamba_cache_dtype="auto",
            mamba_ssm_cache_dtype="float32",
        ),
        attention_config=SimpleNamespace(backend=changes.get("backend")),
        watermark_config=changes.get("watermark"),
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
        "kv_unquantized": "none",
        "quantization": "none",
        "model_folder": "/no/such",
        "model_configuration": "",
        "weights": "",
        "sliding_windows": "on",
        "state_dtype": "auto, float32",
        "attention_backend": "auto",
        "watermark": "none",
        "noise": "fp32",
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


def test_what_decides_kv_or_tokens_is_reported() -> None:
    """gateway/pool/compatibility.py compares it; a watermark's key must not be shown."""
    changed = config(
        skipped=["2", "0"],
        disable_sliding_window=True,
        fp64=True,
        load_format="dummy",
        backend=SimpleNamespace(name="FLASHINFER"),
        watermark={"key": 12345},
        quantization="fp8",
        quantization_config={"linear": "fp8"},
    )
    found = configuration.describe(changed, predicts=False)
    expected = {"kv_unquantized": "0,2", "sliding_windows": "off", "noise": "fp64", "weights": "dummy"}
    expected |= {"attention_backend": "FLASHINFER"}
    assert {name: found[name] for name in expected} == expected
    assert len(found["watermark"]) == 16
    assert "12345" not in str(found)
    assert found["quantization"].startswith("fp8 ")


def test_versions_of_what_is_installed() -> None:
    found = configuration.versions("msgspec", "no-such-package-of-ours")
    assert list(found) == ["msgspec"]
    assert found["msgspec"][0].isdigit()
