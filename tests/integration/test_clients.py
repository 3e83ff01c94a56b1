"""Clients that people use, unmodified: the official openai package and vLLM's own benchmark."""

import asyncio
import json
import sys
from pathlib import Path

import openai
import pytest

from ares import local
from tests.integration.client import Client

# What `vllm bench serve` runs; the `vllm` command itself cannot start in the CPU build, whose distribution has another
# name.
_VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


async def test_the_official_openai_client(client: Client) -> None:
    api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none")
    assert [model.id async for model in api.models.list()] == [client.model]

    whole = await api.chat.completions.create(
        model=client.model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_completion_tokens=20,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"ignore_eos": True},
    )
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 20
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 20
    assert all(len(position.top_logprobs) == 2 for position in logprobs.content)
    assert all(position.logprob <= 0 for position in logprobs.content)

    text, usage, roles = "", None, []
    stream = await api.chat.completions.create(
        model=client.model,
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_completion_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert text == whole.choices[0].message.content
    assert usage == whole.usage
    assert roles == ["assistant"]

    completion = await api.completions.create(model=client.model, prompt=["one", "two"], max_tokens=5, n=2, echo=True)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in completion.choices] == ["one", "one", "two", "two"]


async def test_openai_errors_are_its_exceptions(client: Client) -> None:
    api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "x"}]
    for arguments, kind in (
        ({"model": "nope"}, openai.NotFoundError),
        ({"model": client.model, "max_tokens": 10**6}, openai.BadRequestError),
    ):
        with pytest.raises(kind) as caught:
            await api.chat.completions.create(messages=messages, **arguments)  # type: ignore[call-overload]
        assert caught.value.body["message"]


async def test_vllm_bench_serve_runs_unmodified(client: Client, cluster: local.Cluster, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        _VLLM_BENCH_SERVE,
        *("--backend", "openai", "--base-url", client.url, "--endpoint", "/v1/completions"),
        *("--model", client.model, "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "32"),
        *("--num-prompts", "12", "--max-concurrency", "4", "--ignore-eos", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 150)
    assert process.returncode == 0, output.decode()[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 12
    assert result["total_output_tokens"] == 12 * 32
