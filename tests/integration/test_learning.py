"""A real engine that learns: its states are taken, and a checkpoint that was trained on them predicts."""

import asyncio
import hashlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import aiohttp
import pytest
import zmq
import zmq.asyncio

from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.predictor import checkpoint, dataset, shards, training
from ares.protocol import messages, rpc
from tests.integration.conftest import FORKED, STOCK, TINY_FLAGS, Environments, one_core
from tests.integration.test_predictor import HIDDEN, complete, offline
from tests.predictor.checkpoints import random_checkpoint

T = TypeVar("T")
# As few as training takes with these prompts.
REQUESTS, LIMIT = 50, 45
# Each of them ends an output: about one token in twenty.
STOP_TOKENS = list(range(40, 90))
PART = 50_000


@pytest.fixture(scope="module")
def learning(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    environment_of: Environments,
) -> Iterator[local.ManagedProcess]:
    """Run an instance that learns, with room for all requests of this file."""
    folder = tmp_path_factory.mktemp("learning")
    settings = local.ClusterSettings(
        model=str(tiny_model), vllm_flags=tuple(local_flags(list(TINY_FLAGS))), worker_module=FORKED
    )
    flags = ("--predictor", "learn", "--learn-folder", folder, "--record-at-once", REQUESTS, "--record-token-ids")
    with mock.patch.dict(os.environ, environment_of(STOCK)), local.workers_only(settings) as cluster:
        cluster.start_worker("learning", "both", one_core(), tuple(map(str, flags)))
        cluster.await_workers()
        yield cluster.workers[0]


class Learner:
    """A learner's connection to an instance."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._calls = itertools.count(1)
        self.hello: messages.Hello | None = None
        self.telemetry: messages.Telemetry | None = None

    async def _receive(self) -> messages.Event:
        await self._socket.send(rpc.encode(messages.Subscribe(0.02)))
        event = rpc.decode_event(await asyncio.wait_for(self._socket.recv(), 30))
        if isinstance(event, messages.Hello):
            self.hello = event
        if isinstance(event, messages.Telemetry):
            self.telemetry = event
        return event

    async def _ask(self, command: messages.Command, kind: type[T]) -> T:
        await self._socket.send(rpc.encode(command))
        while not isinstance(event := await self._receive(), kind):
            pass
        return event

    async def take(self, folder: Path, stored: list[str]) -> str:
        """Store the oldest shard in a folder; return its name, empty where there is none."""
        command = messages.TakeRecorded(next(self._calls), "test", stored)
        taken = await self._ask(command, messages.Recorded)
        if taken.name:
            (folder / taken.name).write_bytes(taken.data)
        return taken.name

    async def send(self, data: bytes) -> str:
        """Send a checkpoint, and return its version."""
        version = hashlib.sha256(data).hexdigest()
        for offset in range(0, len(data), PART):
            part = data[offset : offset + PART]
            command = messages.CheckpointPart(next(self._calls), "test", version, offset, len(data), part)
            received = await self._ask(command, messages.CheckpointReceived)
            assert received.refused == ""
            assert received.received == offset + len(part)
        return version

    async def end_predictions(self) -> None:
        command = messages.CheckpointPart(next(self._calls), "test", "")
        assert (await self._ask(command, messages.CheckpointReceived)).refused == ""

    async def until(self, condition: Callable[[messages.Telemetry], bool]) -> messages.Telemetry:
        """Return the first telemetry that satisfies a condition."""
        async with asyncio.timeout(30):
            while True:
                event = await self._receive()
                if isinstance(event, messages.Telemetry) and condition(event):
                    return event


@pytest.fixture
async def learner(learning: local.ManagedProcess) -> AsyncIterator[Learner]:
    async with aiohttp.ClientSession() as http, http.get(f"{learning.url}/ares/v1/instance") as reply:
        address = (await reply.json())["control_address"]
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    rpc.configure(socket, address)
    socket.connect(address)
    connected = Learner(socket)
    await connected.until(lambda _: True)
    yield connected
    socket.close()


async def generate(url: str, model: str, number: int, **given: Any) -> list[int]:
    """Generate the output of a gateway's request; return its tokens."""
    body = {
        "model": model,
        "prompt": f"Request {number}",
        "max_tokens": LIMIT,
        "seed": number,
        "return_token_ids": True,
    }
    body |= {"stop_token_ids": STOP_TOKENS, "kv_transfer_params": {"ares_key": f"gateway/{number}/1"}, **given}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/completions", json=body) as reply:
        found: list[int] = (await reply.json())["choices"][0]["token_ids"]
        return found


async def test_from_requests_to_a_predictor(
    learning: local.ManagedProcess, learner: Learner, tiny_model: Path, tmp_path: Path
) -> None:
    """One story, since each part needs the one before."""
    url, model = learning.url, str(tiny_model)
    assert learner.hello is not None
    assert learner.hello.learns
    assert learner.telemetry is not None
    assert learner.telemetry.predictor == ""

    # Requests are recorded, and their shards are taken.
    outputs = await asyncio.gather(*(generate(url, model, n) for n in range(REQUESTS - 1)))
    outputs.append(await generate(url, model, REQUESTS - 1, logit_bias={"2": 100}, stop_token_ids=[]))
    recorded, stored = tmp_path / "recorded", [""]
    recorded.mkdir()
    deadline = time.monotonic() + 30
    pairs: dataset.Pairs | None = None
    while pairs is None or len(pairs.requests) < REQUESTS or "running" in pairs.outcomes:
        assert time.monotonic() < deadline
        if name := await learner.take(recorded, stored[-1:]):
            stored.append(name)
            pairs = dataset.load(recorded)
        else:
            await asyncio.sleep(0.5)
    assert await learner.take(recorded, stored[-1:]) == ""
    assert pairs.source == shards.Source(model, HIDDEN, 20, 4096, shards.LIVE)
    numbers = [int(request.removeprefix("gateway/")) for request in pairs.requests]
    assert sorted(numbers) == list(range(REQUESTS))
    for n, outcome, tokens in zip(numbers, pairs.outcomes, pairs.output_tokens, strict=True):
        assert tokens.tolist() == outputs[n]
        assert outcome == ("limit" if len(outputs[n]) == LIMIT else "stop")
    assert {"limit", "stop"} == set(pairs.outcomes)
    assert len(outputs[-1]) == 1  # vLLM's own stop token
    assert set(pairs.limits.tolist()) == {LIMIT}
    offline(tiny_model, recorded, 2e-3)

    # A checkpoint that was trained on them predicts; one that does not fit changes nothing; predictions can be ended.
    trained, _ = training.train(pairs, training.settings_of("ours", epochs=1, members=1))
    checkpoint.save(tmp_path / "trained.safetensors", trained)
    checkpoint.save(tmp_path / "other.safetensors", random_checkpoint("another/model", HIDDEN))
    ended = asyncio.Event()
    stories = asyncio.create_task(repeated(url, model, ended))
    version = await learner.send((tmp_path / "trained.safetensors").read_bytes())
    await learner.until(lambda telemetry: telemetry.predictor == version)
    await learner.until(lambda telemetry: any(row.remaining for row in telemetry.rows))
    refused = await learner.send((tmp_path / "other.safetensors").read_bytes())
    found = await learner.until(lambda telemetry: telemetry.predictor_refused[0] == refused)
    assert "another/model" in found.predictor_refused[1]
    assert found.predictor == version
    await learner.until(lambda telemetry: any(row.remaining for row in telemetry.rows))
    await learner.end_predictions()
    await learner.until(lambda telemetry: telemetry.predictor == "" and any(not r.remaining for r in telemetry.rows))
    ended.set()
    outputs = await stories
    assert outputs == [outputs[0]] * len(outputs)


async def repeated(url: str, model: str, ended: asyncio.Event) -> list[list[int]]:
    """Generate one greedy output again and again, in every state of the predictor."""
    outputs = [await complete(url, model, "A long story", 200)]
    while not ended.is_set():
        outputs.append(await complete(url, model, "A long story", 200))
    return outputs
