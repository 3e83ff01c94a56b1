"""Safetensors of the predictor, shards and checkpoints: whole and meant, or refused by name, at no cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ares.predictor import checkpoint, shards  # noqa: E402 - they import torch
from ares.predictor.errors import PredictorError  # noqa: E402 - likewise
from ares.predictor.networks import HazardNetwork, PaperNetwork  # noqa: E402 - likewise
from tests.fuzz.cases import edited, fuzz, json_texts, noise, warped  # noqa: E402 - likewise
from tests.fuzz.test_readers import attempt  # noqa: E402 - likewise

HIDDEN = 8


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(header: str, rest: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors")


@pytest.fixture(scope="module")
def shard(folder: Path) -> bytes:
    rng = np.random.default_rng(0)
    outputs = [
        shards.Output(
            f"r{n}",
            f"p{n}",
            [1, 2, 3],
            [4, 5, 6, 7],
            False,
            [0, 2],
            list(rng.normal(size=(2, HIDDEN)).astype(np.float16)),
        )
        for n in range(2)
    ]
    return shards.write(folder, shards.Source("m", HIDDEN, 2, 10, "greedy"), outputs).read_bytes()


def _trained(folder: Path, arch: str) -> bytes:
    options = {"limit": 100, "members": 2, "width": 4} if arch == "ours" else {}
    network = HazardNetwork(HIDDEN, **options) if arch == "ours" else PaperNetwork(HIDDEN)
    made = checkpoint.Checkpoint(
        network, arch, options, "m", HIDDEN, shards.HIDDEN_STATE, 2, 100, torch.zeros(HIDDEN), torch.ones(HIDDEN)
    )
    file = folder / f"{arch}.safetensors"
    checkpoint.save(file, made)
    checkpoint.load(file).check("m", HIDDEN, shards.HIDDEN_STATE)
    return file.read_bytes()


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[bytes]:
    return [_trained(folder, "ours"), _trained(folder, "paper")]


def _meant(data: st.DataObject, valid: bytes) -> bytes:
    """Draw a file whose header is warped: types, shapes, offsets, and what the metadata say."""
    header, rest = _split(valid)
    if data.draw(st.booleans()):
        return _joined(data.draw(warped(header)), rest)
    said = header["__metadata__"]
    name = data.draw(st.sampled_from(sorted(said)))
    texts = json_texts | st.text(max_size=9) | st.sampled_from(["ours", "paper", "0", "-1", "1" * 30])
    if name == "options":
        texts |= warped({"limit": 100, "members": 2, "width": 4, "bins": 32})
    said[name] = data.draw(texts)
    return _joined(json.dumps(header), rest)


def _read_shard(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    read = attempt(lambda: shards.read(file), PredictorError, file.name)
    if read is not None:
        assert read.tensors["states"].shape[1] == read.source.hidden_size
        assert len(read.requests) == len(read.prompts) == len(read.tensors["output_length"])


@fuzz("readers: shards", 40, data=st.data())
def test_shards_with_other_headers(folder: Path, shard: bytes, data: st.DataObject) -> None:
    _read_shard(folder / "part-x.safetensors", _meant(data, shard))


@fuzz("readers: shards", 40, data=st.data())
def test_bytes_of_shards(folder: Path, shard: bytes, data: st.DataObject) -> None:
    _read_shard(folder / "part-x.safetensors", data.draw(noise(shard)))


def _read_checkpoint(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    read = attempt(lambda: checkpoint.load(file), PredictorError, file.name)
    if read is None:
        return
    size = read.hidden_size
    quantiles = read.network.quantiles(torch.zeros(1, 2 * size), torch.zeros(1, 16))
    assert quantiles.shape == (1, 20)
    assert read.every >= 1
    assert read.limit >= 1


@fuzz("readers: checkpoints", 25, data=st.data(), number=st.integers(0, 1))
def test_checkpoints_with_other_headers(folder: Path, trained: list[bytes], data: st.DataObject, number: int) -> None:
    _read_checkpoint(folder / "x.safetensors", _meant(data, trained[number]))


@fuzz("readers: checkpoints", 25, data=st.data(), number=st.integers(0, 1))
def test_bytes_of_checkpoints(folder: Path, trained: list[bytes], data: st.DataObject, number: int) -> None:
    _read_checkpoint(folder / "x.safetensors", data.draw(noise(trained[number]) | edited(trained[number][:2000])))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hidden_size", "1000000000"),
        ("hidden_size", "-8"),
        ("options", '{"limit": 100, "members": 2, "width": 1000000000}'),
        ("options", '{"limit": 100, "members": 1000000000, "width": 4}'),
        ("options", '{"limit": 100, "members": 2, "width": 4, "bins": 1000000000}'),
        ("options", '{"limit": -5, "members": 2, "width": 4}'),
        ("options", "[]"),
        ("every", "0"),
    ],
)
def test_a_checkpoint_that_claims_too_much_is_refused(folder: Path, trained: list[bytes], name: str, text: str) -> None:
    header, rest = _split(trained[0])
    header["__metadata__"][name] = text
    file = folder / "claims.safetensors"
    file.write_bytes(_joined(json.dumps(header), rest))
    with pytest.raises(PredictorError, match=r"claims\.safetensors: malformed"):
        checkpoint.load(file)


@pytest.mark.parametrize(("name", "text"), [("requests", "5"), ("prompts", "[1, 2]"), ("hidden_size", "0")])
def test_a_shard_that_says_nonsense_is_refused(folder: Path, shard: bytes, name: str, text: str) -> None:
    header, rest = _split(shard)
    header["__metadata__"][name] = text
    file = folder / "part-claims.safetensors"
    file.write_bytes(_joined(json.dumps(header), rest))
    with pytest.raises(PredictorError, match=r"part-claims\.safetensors: malformed"):
        shards.read(file)
