"""Flags that would set another KV connector are refused before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ares.engine import launcher, transfer_flags
from ares.engine.transfer_flags import TransferFlagError

OFFLOADING = ["--kv-offloading-size", "--kv_offloading_size=4", "--kv-offloading-backend=native", "--kv-off"]
CONFIGURED = ["--kv-transfer-config", "--kv_transfer_config={}", "--kv-transfer-config.kv_role=kv_both", "--kv-trans"]


@pytest.mark.parametrize("flag", [*OFFLOADING, *CONFIGURED])
def test_other_connectors_are_refused_with_the_reason(flag: str) -> None:
    with pytest.raises(TransferFlagError) as refused:
        transfer_flags.check(["--max-model-len", "4096", flag, "4"])
    said = str(refused.value)
    assert said.startswith(flag.split("=", maxsplit=1)[0])
    assert "cannot be combined with moves" in said
    assert "leave" in said


def test_flags_with_similar_names_are_passed_on() -> None:
    transfer_flags.check(["--kv-cache-dtype", "fp8", "--kv-events-config", "{}", "--kv-cache-memory-bytes", "1G"])


def test_a_worker_refuses_them_before_its_model_is_resolved() -> None:
    settings = launcher.WorkerSettings(
        "no/model", "decode", "d", "127.0.0.1", 0, vllm_flags=("--kv-offloading-size", "4")
    )
    with pytest.raises(TransferFlagError, match="--kv-offloading-size"):
        launcher.serve(settings)


def test_what_a_file_of_flags_says_is_refused_too(tmp_path: Path) -> None:
    parsed = SimpleNamespace(kv_transfer_config=None, kv_offloading_size=None)
    transfer_flags.check_parsed(parsed)
    with pytest.raises(TransferFlagError, match="kv-offloading-size"):
        transfer_flags.check_parsed(SimpleNamespace(kv_transfer_config=None, kv_offloading_size=4.0))
    pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
    from ares.engine import vllm_api as vllm

    file = tmp_path / "flags.yaml"
    file.write_text(json.dumps({"kv-transfer-config": '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'}))
    parser = vllm.make_arg_parser(vllm.FlexibleArgumentParser())
    with pytest.raises(TransferFlagError, match="kv-transfer-config"):
        transfer_flags.check_parsed(parser.parse_args(["--config", str(file)]))
