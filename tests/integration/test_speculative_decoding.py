"""I1-I5 under speculative decoding: cuts, copies and hand-overs around block boundaries, and the predictor.

Each row runs a cluster of its own: vLLM drafts tokens with a model (here the same one, so that most drafts are
accepted) or with n-grams of the tokens so far, and all instances predict and record.
"""

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import pytest

from ares.engine.defaults import local_flags
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares.predictor import shards
from ares.protocol import messages
from tests.integration.client import Client
from tests.integration.conftest import FORKED, GPU_DEFAULTS, STOCK, TINY_FLAGS, Environments
from tests.integration.streams import losses
from tests.integration.test_predictor import make_checkpoint, offline, telemetry
from tests.waiting import eventually

# Engines start slowly where others keep the machine busy.
pytestmark = pytest.mark.timeout(600)
# The smallest that vLLM's attention takes on a CPU; the class-level tests have smaller ones.
BLOCK = 32
TOKENS = 90
FEW_TOKENS = 40
OFFSETS = range(-4, 5)
NEXT_TO_IT = (-1, 0, 1)
DECODE = ("decode-0", "decode-1")
SEARCH_S = 240.0
# Of the rounds of prompts: a test that fails runs once more, on the same instances.
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Row:
    """A configuration of vLLM, and parameters of its requests."""

    runner: str
    method: str
    parameters: dict[str, Any]

    @property
    def speculation(self) -> dict[str, Any]:
        """vLLM's speculative configuration, without the name of a model."""
        search = {"prompt_lookup_max": 2, "prompt_lookup_min": 1} if self.method == "ngram" else {}
        return {"method": self.method, "num_speculative_tokens": 3, **search}


# The first one runs with all tests, next to a boundary; the others on demand (`make matrix`).
ROWS = (
    Row(GPU_DEFAULTS, "draft_model", {}),
    Row(STOCK, "draft_model", {}),
    # Of few tokens, so that n-grams of the output come again.
    Row(STOCK, "ngram", {"allowed_token_ids": list(range(10, 40))}),
)


@pytest.fixture(
    scope="module",
    params=[ROWS[0], *(pytest.param(row, marks=pytest.mark.matrix) for row in ROWS[1:])],
    ids=lambda row: f"{row.runner}-{row.method}",
)
def row(request: pytest.FixtureRequest) -> Row:
    found: Row = request.param
    return found


@pytest.fixture(scope="module")
def speculating(
    row: Row,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    environment_of: Environments,
) -> Iterator[local.Cluster]:
    folder = tmp_path_factory.mktemp("speculating")
    make_checkpoint(folder / "p.safetensors", str(tiny_model))
    recording = ("--record-hidden-states", str(folder / "recorded"), "--record-fraction", "1")
    model = {"model": str(tiny_model)} if row.method == "draft_model" else {}
    flags = [*TINY_FLAGS, "--block-size", str(BLOCK)]
    flags += ["--speculative-config", json.dumps({**row.speculation, **model})]
    settings = local.ClusterSettings(
        model=str(tiny_model),
        decode=2,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=folder,
        worker_flags=("--predictor", str(folder / "p.safetensors"), *recording),
        vllm_flags=tuple(local_flags(flags)),
        worker_module=FORKED,
    )
    with mock.patch.dict(os.environ, environment_of(row.runner)), local.running(settings) as running:
        yield running


@pytest.fixture
async def client(speculating: local.Cluster) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=240)) as http:
        found = Client(http, speculating.url, speculating.settings.model)
        yield found
        await found.quiet()


def prompts(row: Row, round_: int) -> list[list[int]]:
    """Return prompts that no other round has, around the end of their third block."""
    generator = random.Random(f"{row} {round_}")
    return [[generator.randrange(10, 40) for _ in range(3 * BLOCK + offset)] for offset in OFFSETS]


async def unmoved(client: Client, prompt: list[int], parameters: dict[str, Any], tokens: int = TOKENS) -> list[int]:
    """Ask one engine for the whole output."""
    url = next(i["url"] for i in (await client.status())["instances"] if i["name"] == "decode-1")
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": tokens, "detokenize": False, **parameters}
    async with client.http.post(
        f"{url}/inference/v1/generate", json={"token_ids": prompt, "sampling_params": sampling}
    ) as reply:
        assert reply.status == 200, await reply.text()
        return list((await reply.json())["choices"][0]["token_ids"])


async def counted(client: Client, name: str) -> float:
    return sum([await client.engine_metric(instance, name) for instance in DECODE])


async def keep_moving(client: Client, name: str, task: "asyncio.Task[Any]", generator: random.Random) -> None:
    for mode in itertools.cycle(("stop_and_copy", "pre_copy")):
        if task.done():
            return
        await client.move_on(name, mode=mode)
        await asyncio.sleep(generator.uniform(0.0, 0.1))


async def test_hand_overs_without_moves(client: Client, row: Row) -> None:
    """The control: prompts that end around a block boundary, from prefill to decode, and drafts that are accepted."""
    accepted = await counted(client, "vllm:spec_decode_num_accepted_tokens_total")
    drafted = await counted(client, "vllm:spec_decode_num_draft_tokens_total")
    fresh = prompts(row, 0)
    found = await asyncio.gather(*(client.complete(prompt, FEW_TOKENS, **row.parameters) for prompt in fresh))
    expected = await asyncio.gather(*(unmoved(client, prompt, row.parameters, FEW_TOKENS) for prompt in fresh))
    assert [reply["choices"][0]["token_ids"] for reply in found] == expected
    accepted = await counted(client, "vllm:spec_decode_num_accepted_tokens_total") - accepted
    drafted = await counted(client, "vllm:spec_decode_num_draft_tokens_total") - drafted
    assert 0 < accepted < drafted


async def test_moves_at_every_position_around_a_block_boundary(
    client: Client, row: Row, speculating: local.Cluster, at_length: bool
) -> None:
    """Until a request was cut at each of them; every pull brought what was asked for, and no lease ended."""
    generator = random.Random(3)
    cuts: set[int] = set()
    modes: set[str] = set()
    deadline = time.monotonic() + SEARCH_S
    boundary = {offset % BLOCK for offset in (OFFSETS if at_length else NEXT_TO_IT)}
    for number in _numbers:
        fresh, lost = prompts(row, number), losses(speculating)
        hits = await counted(client, "vllm:external_prefix_cache_hits_total")
        expired = await counted(client, "vllm:nixl_num_kv_expired_reqs_total")
        names = [f"{row.method}-{number}-{n}" for n in range(len(fresh))]
        streams = [client.stream(name, p, TOKENS, **row.parameters) for name, p in zip(names, fresh, strict=True)]
        await asyncio.gather(
            *(keep_moving(client, name, task, generator) for name, (_, task) in zip(names, streams, strict=True))
        )
        outputs = [await task for _, task in streams]
        await client.quiet()
        history = [r for r in (await client.status())["migrations"] if r["request_id"] in names]
        moved = [record for record in history if record["outcome"] == "moved"]
        pulled = [record["pulled_tokens"] for record in moved]
        risen = await counted(client, "vllm:external_prefix_cache_hits_total") - hits
        if losses(speculating) == lost:  # requests of a lost instance are prefilled and pulled again
            ordered = sum((r["pulled_tokens"] or 0) + r["precopied_tokens"] for r in history)
            assert risen == ordered + sum(map(len, fresh)), history
            assert await counted(client, "vllm:nixl_num_kv_expired_reqs_total") == expired
        assert [output.error for output in outputs] == [None] * len(outputs)
        expected = await asyncio.gather(*(unmoved(client, prompt, row.parameters) for prompt in fresh))
        for prompt, output, tokens in zip(fresh, outputs, expected, strict=True):
            assert output.token_ids == tokens, (len(prompt), history)
        # Whole blocks may be in the target's prefix cache.
        cuts |= {count % BLOCK for count in pulled}
        modes |= {record["mode"] for record in moved if record["precopied_tokens"] or record["mode"] != "pre_copy"}
        if cuts >= boundary and len(modes) == 2:
            return
        assert time.monotonic() < deadline, f"cut at {sorted(cuts)} of {sorted(boundary)} by {modes}"


def decoded(shard: Path) -> int:
    """Count the states of a shard that are those of decode."""
    return int((shards.read(shard).tensors["position"] > 0).sum())


async def test_predictions_and_states(client: Client, row: Row, speculating: local.Cluster) -> None:
    """Running requests are predicted, and each recorded state is transformers' own at its position."""
    rows: list[messages.Row] = []
    url = next(i["url"] for i in (await client.status())["instances"] if i["name"] == "decode-0")
    watcher = asyncio.create_task(telemetry(url, rows))
    try:
        await asyncio.gather(*(client.complete(prompt, 300) for prompt in prompts(row, 1000)))
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    predicted = [found for found in rows if found.remaining is not None and found.output > 5]
    assert len({found.key for found in predicted}) > 2
    recorded = speculating.log_folder / "recorded"
    # Each instance writes a shard every ten seconds.
    await eventually(lambda: sum(decoded(file) for file in shards.files(recorded)) > 5, 60)
    pairs = offline(Path(speculating.settings.model), recorded, 2e-3)
    # A decode instance has no state at position 0; a step may pass over one that is due.
    assert len(set(pairs.position[pairs.position > 0])) > 2
