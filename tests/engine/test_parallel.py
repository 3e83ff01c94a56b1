"""What spreads an engine in a way that an instance cannot use is refused before its model is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ares.engine import parallel

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


@pytest.mark.parametrize(
    ("flags", "instead"),
    [
        (["--pipeline-parallel-size", "2"], "--tensor-parallel-size 2"),
        (["-pp", "2", "-tp", "4"], "--tensor-parallel-size 8"),
        (["--data-parallel-size", "2"], "one `ares worker` for each rank"),
        (["-dp", "4", "--data-parallel-rank", "1"], "one `ares worker` for each rank"),
        (["--headless"], "one `ares worker` on each host"),
        (["--nnodes", "2", "--node-rank", "0"], "one `ares worker` on each host"),
        (["--api-server-count", "2"], "leave it out"),
        (["--grpc"], "leave it out"),
    ],
)
def test_it_is_refused_with_what_to_do_instead(flags: list[str], instead: str) -> None:
    said = parallel.unsupported(_parsed(*flags))
    assert said is not None
    assert instead in said


@pytest.mark.parametrize("flags", [[], ["-tp", "4"], ["-pp", "1", "-dp", "1", "--nnodes", "1"]])
def test_one_host_and_tensor_parallelism_are_supported(flags: list[str]) -> None:
    assert parallel.unsupported(_parsed(*flags)) is None


def _parsed(*flags: str) -> object:
    from ares.engine import vllm_api as vllm

    return vllm.make_arg_parser(vllm.FlexibleArgumentParser()).parse_args(["--model", "some/model", *flags])


def test_vllms_own_configuration_has_the_same_names() -> None:
    """For the connector, which sees the configuration only."""
    from vllm.config import ParallelConfig

    assert parallel.unsupported(ParallelConfig()) is None
    assert "--tensor-parallel-size 2" in str(parallel.unsupported(ParallelConfig(pipeline_parallel_size=2)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model without weights: whoever loads them fails otherwise."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, **shape}
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return tmp_path


def test_ares_worker_refuses_it_in_one_line(model: Path) -> None:
    command = ["worker", "--role", "decode", "--model", str(model), "--", "--pipeline-parallel-size", "2"]
    ended = subprocess.run([sys.executable, "-m", "ares", *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: --pipeline-parallel-size 2: ")


def test_vllm_serve_with_our_connector_is_refused_while_it_is_configured(model: Path) -> None:
    transfer = {"kv_connector": "NixlConnector", "kv_connector_module_path": "ares.engine.connector.connector"}
    code = f"""
from vllm import AsyncEngineArgs
transfer = {{**{transfer}, "kv_role": "kv_both"}}
AsyncEngineArgs(model={str(model)!r}, skip_tokenizer_init=True, kv_transfer_config=transfer).create_engine_config()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "the ARES connector runs inside `ares worker`" in ended.stderr.splitlines()[-1]
