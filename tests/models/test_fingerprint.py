"""What tells models of one name apart."""

import json
from pathlib import Path

import pytest

from ares.models import fingerprint


def made(folder: Path, *, weights: bytes = bytes(range(256)) * 4000, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, **config}))
    (folder / "model-00001.safetensors").write_bytes(weights)
    (folder / "model-00002.safetensors").write_bytes(b"few")
    return folder


def test_copies_are_equal(tmp_path: Path) -> None:
    one = made(tmp_path / "one", transformers_version="5.0", dtype="float32")
    other = made(tmp_path / "other", transformers_version="5.1", _name_or_path="a/b")
    assert fingerprint.of_configuration(one) == fingerprint.of_configuration(other, {}) != ""
    assert fingerprint.of_weights(one) == fingerprint.of_weights(other) != ""
    (other / "tokenizer.json").write_text("{}")
    assert fingerprint.of_weights(one) == fingerprint.of_weights(other)


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"hidden_size": 65}, {"quantization_config": {"bits": 4}}])
def test_configurations_differ(tmp_path: Path, change: dict[str, object]) -> None:
    one = made(tmp_path / "one")
    assert fingerprint.of_configuration(one) != fingerprint.of_configuration(made(tmp_path / "other", **change))
    assert fingerprint.of_configuration(one) != fingerprint.of_configuration(one, change)


def test_weights_differ(tmp_path: Path) -> None:
    """Of a fine-tuned model, most weights have changed; of another one, the size has."""
    one = made(tmp_path / "one")
    tuned = bytes(byte ^ 1 for byte in bytes(range(256)) * 4000)
    prints = {fingerprint.of_weights(made(tmp_path / str(n), weights=other)) for n, other in enumerate((tuned, b"x"))}
    assert len(prints | {fingerprint.of_weights(one)}) == 3


def test_what_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    assert fingerprint.of_weights(tmp_path) == fingerprint.of_configuration(tmp_path) == ""
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert fingerprint.of_configuration(tmp_path) == ""
    (tmp_path / "config.json").write_text("[]")
    assert fingerprint.of_configuration(tmp_path) == ""
