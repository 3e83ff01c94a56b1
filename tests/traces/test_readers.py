"""Every format is read to the same workload, and bad input is named by file and line."""

from pathlib import Path

import numpy as np
import pytest

from ares.traces import TraceError, guess_format, read_trace, synthetic

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,396,109\n"
)
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 374, "output_length": 44, "hash_ids": [0]}\n'
    '{"timestamp": 2500, "input_length": 396, "output_length": 109, "hash_ids": [0, 1]}\n'
)
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,374,44,418,x\n6.5,GPT-4,396,109,505,x\n"
)
PLAIN = "arrival_s,input_tokens,output_tokens\n9.5,396,109\n8,374,44\n"


@pytest.mark.parametrize(
    ("name", "text"), [("azure", AZURE), ("mooncake", MOONCAKE), ("burstgpt", BURST), ("csv", PLAIN)]
)
def test_formats_agree(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    assert guess_format(path) == name
    work = read_trace(path)
    np.testing.assert_allclose(work.arrival_s, [0.0, 1.5])
    np.testing.assert_array_equal(work.prompt_tokens, [374, 396])
    np.testing.assert_array_equal(work.output_tokens, [44, 109])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("arrival_s,input_tokens,output_tokens\n", "empty"),
        ("when,what\n1,2\n", r"trace:1: unknown columns what, when"),
        ("arrival_s,input_tokens,output_tokens\n0,5,5\n1,-5,5\n", r"trace:3: negative"),
        ("arrival_s,input_tokens,output_tokens\n0,five,5\n", r"trace:2: .*five"),
        ("arrival_s,input_tokens,output_tokens\n0,nan,5\n", r"trace:2: negative or infinite"),
        ("arrival_s,input_tokens,output_tokens\n0,5\n", r"trace:2: no column output_tokens"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 5}\n{oops\n', r"trace:2: not JSON"),
        ('{"timestamp": 0, "input_length": 5}\n', r"trace:1: no column output_length"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nowhere"):
        read_trace(tmp_path / "nowhere.csv")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(TraceError, match="binary"):
        read_trace(binary)


def test_zone_and_plain_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,1,2\n2024-05-10 00:00:00.009930+00:00,1,2\n"
    )
    np.testing.assert_allclose(read_trace(path).arrival_s, [0.0, 0.00993], atol=1e-6)


def test_the_paper_mix_matches_the_paper() -> None:
    work = synthetic("paper", 50_000, seed=0)
    assert np.mean(work.output_tokens < 1000) == pytest.approx(0.292, abs=0.01)
    assert np.mean(work.output_tokens > 30_000) == pytest.approx(0.173, abs=0.01)
    assert work.output_tokens.max() <= 32_000


def test_rate_and_repetition() -> None:
    work = synthetic("chat", 1000, seed=3, rate=2.0)
    assert work.at_rate(7.0).rate == pytest.approx(7.0)
    twice = work.repeated(2500)
    assert len(twice) == 2500
    assert (np.diff(twice.arrival_s) >= 0).all()
    assert twice.rate == pytest.approx(work.rate, rel=0.01)
    np.testing.assert_array_equal(twice.output_tokens[2000:], work.output_tokens[:500])


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown workload 'nope'; known: paper"):
        synthetic("nope", 10, seed=0)
