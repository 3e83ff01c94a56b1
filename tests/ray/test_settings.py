from typing import Any

import pytest
from pydantic import ValidationError

from ares.ray.settings import Settings

SIMULATED: dict[str, Any] = {"model": "org/model", "simulate": "llama-8b-rtx4090"}


def test_flags_go_where_those_of_ares_up_go() -> None:
    settings = Settings(
        model="org/model",
        flags="--max-model-len 4096 --served-model-name one two --chat-template 'a b.jinja {}'",
        decode_flags=["--max-num-seqs", "8"],
    )
    shared = ["--max-model-len", "4096", "--served-model-name", "one", "two"]
    assert settings.worker_arguments("prefill") == ["--model", "org/model", *shared]
    assert settings.worker_arguments("decode") == ["--model", "org/model", *shared, "--max-num-seqs", "8"]
    assert settings.gateway_settings() == {
        "model": "org/model",
        "served_model_name": ["one", "two"],
        "chat_template": "a b.jinja {}",
    }


def test_the_roles_are_those_of_ares_up() -> None:
    assert Settings(**SIMULATED, prefill=2, decode=3).roles() == [("Prefill", "prefill", 2), ("Decode", "decode", 3)]
    assert Settings(**SIMULATED, prefill=0, decode=3).roles() == [("Decode", "both", 3)]


@pytest.mark.parametrize(
    ("given", "cpu_build", "gpus"),
    [
        ({"flags": "-tp 4"}, False, 4),
        ({"decode_flags": "--tensor-parallel-size=2"}, False, 2),
        ({}, False, 1),
        ({"flags": "-tp 4", "gpus": 0.5}, False, 0.5),
        ({"flags": "-tp 4"}, True, 0),
        ({"simulate": "llama-8b-rtx4090"}, False, 0),
    ],
)
def test_an_instance_gets_the_gpus_that_its_flags_ask_for(
    given: dict[str, Any], cpu_build: bool, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ares.ray.settings.is_cpu_build", lambda: cpu_build)
    assert Settings(model="org/model", **given).instance_gpus("decode") == gpus


def test_arguments_of_the_command_line_are_text() -> None:
    given = {**SIMULATED, "prefill": "2", "cpus": "0.5", "wait_for_nodes": "true", "per_node": "1"}
    found = Settings.model_validate(given)
    assert (found.prefill, found.cpus, found.wait_for_nodes, found.per_node) == (2, 0.5, True, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"decoded": 2}, "decoded"),
        ({"decode": 0}, "greater than or equal to 1"),
        ({"cpus": "nan"}, "finite"),
        ({"model": ""}, "at least 1 character"),
        ({"prefill": 0, "prefill_flags": "--max-num-seqs 8"}, "prefill_flags have no effect"),
        ({"flags": "--port 8100"}, "--port is set by the application: a free one is taken"),
        ({"flags": ["--control-port=8100"]}, "--control-port is set by the application"),
        ({"flags": "--instances 4"}, "--instances is set by the application: give prefill and decode"),
        ({"flags": "--api-key secret"}, "VLLM_API_KEY"),
        ({"flags": "--chat-template 'unbalanced"}, "No closing quotation"),
        ({"flags": "--middleware a.b"}, "--middleware would have no effect"),
        ({"decode_flags": "--chat-template x"}, "--chat-template acts on the gateway"),
        ({"gateway": {"port": 8000}}, "port has no effect in Serve: give http_options"),
        ({"gateway": {"presett": "off"}}, "presett"),
        ({"gateway": {"preset": "no-such"}}, "no-such"),
        ({"flags": "--response-role a", "gateway": {"response_role": "b"}}, "response_role is given by flags, too"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        Settings(**SIMULATED | given)
    assert "secret" not in str(caught.value)


def test_what_would_make_moves_inexact_is_refused() -> None:
    with pytest.raises(ValidationError, match="--kv-offloading-size"):
        Settings(model="org/model", flags="--kv-offloading-size 4")
