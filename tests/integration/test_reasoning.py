"""A grammar that begins where the reasoning ends, on a cluster of its own whose requests are moved (make matrix)."""

import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import pytest

from ares.engine.defaults import local_flags
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares_dev.differential.compare import compare_moved
from tests.integration.client import Client
from tests.integration.conftest import FORKED, STOCK, TINY_FLAGS, Environments
from tests.integration.tiny_model import VOCABULARY

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(600)]

# The last tokens of the tiny model become the parser's.
START, END = VOCABULARY - 2, VOCABULARY - 1
_SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "minLength": 60}}, "required": ["text"]}


@pytest.fixture(scope="module")
def thinking_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with the tokens `<think>` and `</think>`."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("thinking") / "model"))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    replaced = {name for name, number in vocabulary.items() if number in (START, END)}
    for name in replaced:
        del vocabulary[name]
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [pair for pair in merges if "".join(pair) not in replaced and not {*pair} & replaced]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for number, name in ((START, "<think>"), (END, "</think>")):
        tokenizer["added_tokens"].append({"id": number, "content": name, **flags})
    file.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def thinking_cluster(
    thinking_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    environment_of: Environments,
) -> Iterator[local.Cluster]:
    settings = local.ClusterSettings(
        model=str(thinking_model),
        decode=2,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path_factory.mktemp("logs"),
        vllm_flags=tuple(local_flags([*TINY_FLAGS, "--reasoning-parser", "deepseek_r1"])),
        worker_module=FORKED,
    )
    with mock.patch.dict(os.environ, environment_of(STOCK)), local.running(settings) as running:
        yield running


@pytest.fixture
async def thinking(thinking_cluster: local.Cluster) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as http:
        client = Client(http, thinking_cluster.url, thinking_cluster.settings.model)
        yield client
        await client.quiet()


def body(**fields: Any) -> dict[str, Any]:
    """Return a chat whose answer is JSON: the bias ends the reasoning, and then the grammar excludes its token."""
    return {
        "messages": [{"role": "user", "content": "Think, then answer."}],
        "temperature": 0,
        "max_tokens": 200,
        "logit_bias": {str(END): 100},
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}},
        **fields,
    }


async def test_moves_within_the_answer(thinking: Client) -> None:
    requests = {
        f"{name} {number}": (
            "/v1/chat/completions",
            body(messages=[{"role": "user", "content": f"Answer number {number}."}], **fields),
        )
        for number in range(4)
        for name, fields in {"whole": {}, "stream": {"stream": True, "stream_options": {"include_usage": True}}}.items()
    }
    found = await compare_moved(thinking.http, thinking.url, thinking.model, requests)
    assert not found.different
    assert found.moves["moved"] >= len(requests)
    async with thinking.http.post(f"{thinking.url}/v1/chat/completions", json={"model": thinking.model, **body()}) as r:
        reply = await r.json()
    assert reply["choices"][0]["message"]["reasoning"] in ("", None)  # it ends with its first token
    text = reply["choices"][0]["message"]["content"]
    # The answer follows the schema from its first token on, whether or not the limit cuts it.
    assert text.lstrip().startswith("{")
    assert "text" in text
