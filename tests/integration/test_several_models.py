"""Two models on real engines behind one gateway: every request gets the tokens of its own model, and stays with it."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import pytest
import yaml
from tokenizers import Tokenizer

from ares.engine.defaults import local_flags
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from tests.integration.client import Client
from tests.integration.conftest import STOCK, TINY_FLAGS, Environments, one_core
from tests.integration.tiny_model import build
from tests.waiting import eventually_found

# Of another width and vocabulary than the tiny model, and so with another tokenizer.
OTHER = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
TEXT = "Once upon a time there was a model of language, and another one."
LENGTH = 1000
INSTANCES = {"prefill-0": "tiny", "decode-0": "tiny", "decode-1": "tiny", "other-0": "other"}


@pytest.fixture
async def both(
    client: Client, cluster: local.Cluster, tmp_path: Path, environment_of: Environments
) -> AsyncIterator[tuple[Client, dict[str, Path]]]:
    """A second gateway, before the shared instances of the tiny model and one of another model."""
    (tmp_path / "other").mkdir()
    models = {"tiny": Path(cluster.settings.model), "other": build(tmp_path / "other", **OTHER)}
    flags = tuple(local_flags([*TINY_FLAGS, "--served-model-name", "other"]))
    settings = replace(cluster.settings, model=str(models["other"]), log_folder=tmp_path, vllm_flags=flags)
    with mock.patch.dict(os.environ, environment_of(STOCK)), local.workers_only(settings) as own:
        own.ports += cluster.ports
        own.start_worker("other-0", "both", one_core())
        port = free_port("127.0.0.1", own.ports)
        entries = [{"model": str(folder), "served_model_name": [name]} for name, folder in models.items()]
        urls = [worker.url for worker in (*cluster.workers, *own.workers)]
        (tmp_path / "gateway.yaml").write_text(yaml.safe_dump({"models": entries, "workers": urls, "preset": "off"}))
        command = ["gateway", "--config", str(tmp_path / "gateway.yaml"), "--port", str(port)]
        own.await_workers()
        own.start("several", f"http://127.0.0.1:{port}", command)
        gateway = Client(client.http, own.processes[-1].url, "tiny")

        async def ready() -> bool:
            own.check()
            with contextlib.suppress(aiohttp.ClientError):
                rows = (await gateway.status())["instances"]
                return {row["name"]: row["model"] for row in rows if row["healthy"]} == INSTANCES
            return False

        await eventually_found(ready, 120)
        yield gateway, models


async def of_the_engine(gateway: Client, name: str, prompt: list[int], tokens: int) -> list[int]:
    """Ask an instance itself."""
    url = next(row["url"] for row in (await gateway.status())["instances"] if row["name"] == name)
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens, "detokenize": False}
    body = {"token_ids": prompt, "sampling_params": sampling}
    async with gateway.http.post(f"{url}/inference/v1/generate", json=body) as reply:
        assert reply.status == 200, await reply.text()
        return list((await reply.json())["choices"][0]["token_ids"])


async def command(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ares", *arguments), stdout=asyncio.subprocess.PIPE, env=os.environ | {"COLUMNS": "200"}
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


@pytest.mark.timeout(300)
async def test_each_request_stays_with_its_model(both: tuple[Client, dict[str, Path]]) -> None:
    gateway, models = both
    async with gateway.http.get(f"{gateway.url}/v1/models") as reply:
        assert [one["id"] for one in (await reply.json())["data"]] == ["tiny", "other"]

    # Text becomes tokens by the model's own tokenizer, and those become the tokens of its own engine.
    replies: dict[str, dict[str, Any]] = {}
    tokenizers = {name: Tokenizer.from_file(str(folder / "tokenizer.json")) for name, folder in models.items()}
    prompts = {name: tokenizer.encode(TEXT).ids for name, tokenizer in tokenizers.items()}
    assert prompts["tiny"] != prompts["other"]
    for name, engine in (("tiny", "decode-0"), ("other", "other-0")):
        replies[name] = await gateway.complete(TEXT, 40, model=name)
        assert replies[name]["model"] == name
        assert replies[name]["usage"]["prompt_tokens"] == len(prompts[name])
        expected = await of_the_engine(gateway, engine, prompts[name], 40)
        assert replies[name]["choices"][0]["token_ids"] == expected
    assert max(replies["other"]["choices"][0]["token_ids"]) < OTHER["vocab_size"]
    body = gateway.body(TEXT, 5, model="neither")
    async with gateway.http.post(f"{gateway.url}/v1/completions", json=body) as reply:
        assert reply.status == 404
        assert (await reply.json())["error"]["message"] == "The model `neither` does not exist."

    # One of each model runs: neither goes to the other's instances, and one moves between those of its own.
    expected = await of_the_engine(gateway, "decode-1", prompts["tiny"], LENGTH)
    beside = await of_the_engine(gateway, "other-0", prompts["other"], LENGTH)
    for attempt in range(10):  # a busy machine may end the request before the order comes
        moving, first = gateway.stream(f"moves-{attempt}", TEXT, LENGTH, model="tiny")
        staying, second = gateway.stream(f"stays-{attempt}", TEXT, LENGTH, model="other")
        await asyncio.gather(moving.reach(5), staying.reach(5))
        row = await gateway.row(f"moves-{attempt}")
        across = await gateway.migrate(f"moves-{attempt}", "other-0")
        back = await gateway.migrate(f"stays-{attempt}", "decode-0")
        record = await gateway.move_on(f"moves-{attempt}", exclude=("other-0",))
        await asyncio.gather(first, second)
        assert moving.token_ids == expected
        assert staying.token_ids == beside
        if row is None or record is None or record["outcome"] != "moved" or {across[0], back[0]} != {409}:
            continue
        assert record["target"] in {"decode-0", "decode-1"} - {row["instance"]}
        assert across[1]["error"]["message"] == "other-0 does not serve tiny: requests do not move between models"
        assert back[1]["error"]["message"] == "decode-0 does not serve other: requests do not move between models"
        break
    else:
        raise AssertionError(f"no move in 10 outputs of {LENGTH} tokens: {across} {back} {record}")
    await gateway.quiet()

    shown = await command("status", "--url", gateway.url)
    of_tiny, of_other = shown.split("instances of other")  # a table for each model
    assert all(name in of_tiny for name in ("instances of tiny", "prefill-0", "decode-0", "decode-1")), shown
    assert "other-0" not in of_tiny, shown
    assert "other-0" in of_other, shown
