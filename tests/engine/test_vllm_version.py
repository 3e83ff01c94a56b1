"""Versions of vLLM: which are supported, and what is said of the others."""

import pytest

from ares.engine import vllm_version
from ares.engine.vllm_version import UnsupportedVllmError
from ares.protocol.fields import ALLOW_UNSUPPORTED_VLLM_VARIABLE as VARIABLE


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.33.0+cu129", "v0.33.0rc1"])
def test_supported(version: str) -> None:
    vllm_version.check(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.34.0.dev12+g1234", "1.0", "0.3", "0.1.dev1", "", "main"])
def test_others_are_refused_in_a_sentence(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedVllmError) as refused:
        vllm_version.check(version)
    said = str(refused.value)
    assert f"vLLM {version or 'of an unknown version'} is installed" in said
    assert "0.32 and 0.33" in said
    assert "--allow-unsupported-vllm" in said
    assert f"{VARIABLE}=1" in said
    monkeypatch.setenv(VARIABLE, "true")
    vllm_version.check(version)
    monkeypatch.setenv(VARIABLE, "0")
    with pytest.raises(UnsupportedVllmError):
        vllm_version.check(version)
    monkeypatch.setenv(VARIABLE, "perhaps")
    with pytest.raises(UnsupportedVllmError, match=f"{VARIABLE}: .*boolean"):
        vllm_version.check(version)


def test_releases_are_compared_by_number() -> None:
    assert vllm_version.release("0.9.2") < vllm_version.release("0.32.0") < vllm_version.release("1.0.0")
