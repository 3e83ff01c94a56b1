"""Flags of vLLM's front end: each acts on the gateway or an instance, or is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ares.config import GatewayConfig
from ares.engine import front_end_flags, launcher
from ares.engine.front_end_flags import FLAGS, FrontEndFlagError, Place, check, split

VALUES = {
    "allowed-headers": '["X-A"]',
    "allowed-methods": '["GET"]',
    "allowed-origins": '["*"]',
    "chat-template": "{{ messages }}",
    "chat-template-content-format": "openai",
    "default-chat-template-kwargs": '{"a": {"b": 1}}',
    "generation-config": "vllm",
    "max-logprobs": "-1",
    "override-generation-config": '{"max_new_tokens": 5}',
    "reasoning-parser": "qwen3",
    "reasoning-parser-plugin": "parser.py",
    "response-role": "bot",
    "served-model-name": "a",
    "sse-keep-alive-interval": "15",
    "tokenizer": "some/tokenizer",
    "tool-call-parser": "hermes",
    "tool-parser-plugin": "parser.py",
    "tool-strict-level": "function",
}
# Flags that have an effect only together with others.
NEEDED: dict[str, dict[str, Any]] = {
    "enable-auto-tool-choice": {"tool_call_parser": "hermes"},
    "reasoning-parser-plugin": {"reasoning_parser": "mine"},
    "tool-call-parser": {"enable_auto_tool_choice": True},
    "tool-parser-plugin": {"tool_call_parser": "mine", "enable_auto_tool_choice": True},
    "tool-strict-level": {"tool_call_parser": "mine", "enable_auto_tool_choice": True},
}
OF_THE_GATEWAY = sorted(name for name, flag in FLAGS.items() if flag.place in (Place.GATEWAY, Place.BOTH))
REFUSED = sorted(name for name, flag in FLAGS.items() if flag.place is Place.NOWHERE)


@pytest.mark.parametrize("name", OF_THE_GATEWAY)
def test_a_flag_of_the_gateway_is_one_of_its_settings(name: str) -> None:
    words = [f"--{name}", *([VALUES[name]] if name in VALUES else [])]
    found = split(["--seed", "1", *words, "--max-num-seqs=8"])
    assert found.others == ["--seed", "1", "--max-num-seqs=8"]
    assert list(found.settings) == [name.replace("-", "_")]
    needed = NEEDED.get(name, {})
    made = GatewayConfig(model="m", workers=["http://127.0.0.1:1"], **found.settings, **needed)
    setting = name.replace("-", "_")
    default = GatewayConfig(model="m", workers=["http://127.0.0.1:1"])
    assert getattr(made, setting) != getattr(default, setting)
    assert split(found.words()).settings == found.settings
    shared = FLAGS[name].place is Place.BOTH
    assert (f"--{name}" in found.instance_flags()) == shared
    assert (f"--{name}" in found.instance_flags(mock=True)) == (name == "served-model-name")
    if not shared:
        with pytest.raises(FrontEndFlagError, match=f"--{name} acts on the gateway: give it to `ares gateway`"):
            check(words, up=False)


def test_vllms_spellings() -> None:
    given = ["--served_model_name=a", "--served-model-name", "b", "c", "--no-trust-request-chat-template"]
    given += ["--default-chat-template-kwargs.x.y", "1", "--default_chat_template_kwargs.z=on", "--x.y", "2"]
    found = split(given)
    assert found.settings == {
        "served_model_name": ["a", "b", "c"],
        "trust_request_chat_template": False,
        "default_chat_template_kwargs": {"x": {"y": 1}, "z": "on"},
    }
    assert found.others == ["--x.y", "2"]
    assert split(found.words()).settings == found.settings


@pytest.mark.parametrize(
    "flags", [["--allowed-origins", "x"], ["--served-model-name"], ["--override-generation-config"]]
)
def test_a_flag_without_a_value_that_can_be_read(flags: list[str]) -> None:
    with pytest.raises(FrontEndFlagError, match=flags[0]):
        split(flags)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_without_an_effect_is_refused(name: str, up: bool) -> None:
    for word in (f"--{name}", f"--{name}=1", f"--{name.replace('-', '_')}"):
        with pytest.raises(FrontEndFlagError, match=f"--{name} would have no effect: ..."):
            check(["--seed", "1", word, "x"], up=up)
    check([f"--no-{name}"], up=up)


@pytest.mark.parametrize("name", sorted(name for name, flag in FLAGS.items() if flag.place is Place.SERVER))
def test_flags_of_an_instances_server_are_for_ares_worker(name: str) -> None:
    check([f"--{name}", "1"], up=False)
    with pytest.raises(FrontEndFlagError, match=f"--{name} would have no effect"):
        check([f"--{name}", "1"], up=True)


def test_others_are_passed_on() -> None:
    for up in (False, True):
        check(["--max-num-seqs", "8", "--uvicorn-log-level=error", "--tokenizer-mode", "hf", "value", "-q"], up=up)
        with pytest.raises(FrontEndFlagError, match="--no-enable-scale-out"):
            check(["--no-enable-scale-out"], up=up)
        with pytest.raises(FrontEndFlagError, match="--tokenizer-mode"):
            check(["--tokenizer-mode", "mistral"], up=up)


def test_a_worker_refuses_them_before_its_model_is_resolved() -> None:
    settings = launcher.WorkerSettings("no/model", "decode", "d", "127.0.0.1", 0, vllm_flags=("--chat-template", "x"))
    with pytest.raises(FrontEndFlagError, match="--chat-template"):
        launcher.serve(settings)


@pytest.fixture(scope="module")
def parser() -> Any:
    pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
    from ares.engine import vllm_api as vllm

    return vllm.make_arg_parser(vllm.FlexibleArgumentParser())


def test_every_flag_of_vllms_front_end_has_its_place(parser: Any) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    every = {name.replace("_", "-") for name in vars(parser.parse_args([]))}
    engine = {field.name.replace("_", "-") for field in dataclasses.fields(AsyncEngineArgs)}
    front_end = {field.name.replace("_", "-") for field in dataclasses.fields(FrontendArgs)}
    assert len(front_end) > 50
    assert (front_end | every - engine) - FLAGS.keys() == {"model-tag"}  # --model
    assert FLAGS.keys() - every == set()


def test_what_vllm_reads_is_checked_too(parser: Any, tmp_path: Path) -> None:
    defaults = parser.parse_args([])
    front_end_flags.check_parsed(parser.parse_args(["--served-model-name", "x", "--enable-log-requests"]), defaults)
    file = tmp_path / "flags.yaml"
    file.write_text(json.dumps({"response-role": "bot"}))
    for flags in (["--config", str(file)], ["--response-rol", "bot"]):
        with pytest.raises(FrontEndFlagError, match="--response-role"):
            front_end_flags.check_parsed(parser.parse_args(flags), defaults)
    for flags in (["--no-enable-scale-out"], ["--enable-request-id-headers"]):
        with pytest.raises(FrontEndFlagError, match="-enable-"):
            front_end_flags.check_parsed(parser.parse_args([*flags]), parser.parse_args(["--enable-scale-out"]))
