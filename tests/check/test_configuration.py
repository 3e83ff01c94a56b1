"""Whether what instances run with fits together, by what they report."""

from types import SimpleNamespace
from typing import Any

import pytest

from ares.check import configuration
from ares.check.instances import Found
from ares.check.rows import Outcome, Row
from ares.protocol import messages

ENGINE = {
    "model_runner": "V2",
    "scheduling": "asynchronous",
    "dtype": "bfloat16",
    "kv_cache_dtype": "auto",
    "quantization": "none",
    "kv_unquantized": "none",
    "model_folder": "/models/a",
    "model_configuration": "1a",
    "weights": "2b",
    "sliding_windows": "on",
    "state_dtype": "auto, auto",
    "attention_backend": "auto",
    "watermark": "none",
    "noise": "fp32",
    "speculative_decoding": "off",
    "lora": "off",
    "batch_invariant": "off",
}
VERSIONS = {"ares": "1", "nixl": "1.5.1", "torch": "2.13.0"}


def found(
    name: str, *, vllm: str = "0.32.0", tp: int = 1, versions: dict[str, str] | None = None, **more: Any
) -> Found:
    hello = messages.Hello(
        name=name,
        role="decode",
        boot=name,
        peer=messages.Peer(name, "127.0.0.1", 5600, tp_size=tp),
        block_size=more.pop("block_size", 16),
        kv_blocks=100,
        max_model_len=1000,
        versions=VERSIONS | (versions or {}),
        prefix_caching=more.pop("prefix_caching", True),
        carries=more.pop("carries", ["output", "seed", "structured_outputs"]),
        kv_groups=[messages.KvGroup(16, window=more.pop("window", 0))],
        configuration=ENGINE | more,
    )
    instance: Any = SimpleNamespace(name=name)
    return Found(instance, messages.Description(name, "decode", name, "tcp://127.0.0.1:1"), hello, vllm)


def rows(*instances: Found) -> dict[str, Row]:
    return {row.check: row for row in configuration.rows(list(instances))}


def test_equal_instances_pass() -> None:
    assert {row.outcome for row in rows(found("a"), found("b")).values()} == {Outcome.PASS}


@pytest.mark.parametrize(
    ("check", "change", "outcome", "value"),
    [
        ("vLLM", {"vllm": "0.32.1"}, Outcome.FAIL, "0.32.0: a; 0.32.1: b"),
        ("NIXL", {"versions": {"nixl": "1.4.0"}}, Outcome.FAIL, "1.5.1: a; 1.4.0: b"),
        ("torch", {"versions": {"torch": "2.12.0"}}, Outcome.WARN, "2.13.0: a; 2.12.0: b"),
        ("ARES", {"versions": {"ares": "2"}}, Outcome.WARN, "1: a; 2: b"),
        ("model runner", {"model_runner": "V1"}, Outcome.WARN, "V2: a; V1: b"),
        ("scheduling", {"scheduling": "synchronous"}, Outcome.WARN, "asynchronous: a; synchronous: b"),
        ("data type", {"dtype": "float16"}, Outcome.FAIL, "bfloat16: a; float16: b"),
        ("KV cache data type", {"kv_cache_dtype": "fp8"}, Outcome.FAIL, "auto: a; fp8: b"),
        ("KV block size", {"block_size": 32}, Outcome.FAIL, "16: a; 32: b"),
        (
            "KV groups",
            {"window": 512},
            Outcome.FAIL,
            "16 tokens, window 0, fixed 0: a; 16 tokens, window 512, fixed 0: b",
        ),
        ("model configuration", {"model_configuration": "1b"}, Outcome.FAIL, "1a: a; 1b: b"),
        ("model folder", {"model_folder": "/b"}, Outcome.FAIL, "/models/a: a; /b: b"),
        ("weights", {"weights": "2c"}, Outcome.FAIL, "2b: a; 2c: b"),
        ("random noise", {"noise": "fp64"}, Outcome.WARN, "fp32: a; fp64: b"),
        ("tensor parallel size", {"tp": 2}, Outcome.WARN, "1: a; 2: b"),
        ("prefix caching", {"prefix_caching": False}, Outcome.WARN, "off on b"),
        ("supported vLLM", {"vllm": "0.29.0"}, Outcome.FAIL, "0.29.0 on b"),
        ("movable requests", {"carries": ["seed", "output"]}, Outcome.WARN, "all but those with structured_outputs"),
        (
            "movable requests",
            {"carries": ["seed", "output", "structured_outputs", "structured_outputs_after_reasoning"]},
            Outcome.WARN,
            "all but those with structured_outputs_after_reasoning",
        ),
    ],
)
def test_a_difference_is_named_with_its_instances(
    check: str, change: dict[str, Any], outcome: Outcome, value: str
) -> None:
    row = rows(found("a"), found("b", **change))[check]
    assert row.outcome is outcome
    assert row.value.startswith(value)
    assert row.advice


def test_what_an_earlier_version_does_not_report_is_not_run() -> None:
    old = found("a")
    old = Found(
        old.instance, old.description, messages.Hello("a", "decode", "a", old.hello.peer, 16, 9, 9, {}), "0.32.0"
    )
    (row,) = [row for row in configuration.rows([old]) if "model runner" in row.check]
    assert row.outcome is Outcome.NOT_RUN
    assert "earlier ARES" in row.value


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ([{}, {}], False),
        ([{"dtype": "float32"}, {"dtype": "float32"}], True),
        ([{"batch_invariant": "on"}, {"batch_invariant": "on"}], True),
        ([{"dtype": "float32"}, {}], False),
        ([{"dtype": "float32", "tp": 2}, {"dtype": "float32"}], False),
    ],
)
def test_equal_tokens_are_expected_where_rounding_cannot_change_them(
    changes: list[dict[str, Any]], exact: bool
) -> None:
    assert configuration.exact([found(str(n), **change) for n, change in enumerate(changes)]) is exact
