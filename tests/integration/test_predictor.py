"""The hidden-state hook, the predictor and the recorder on a real engine."""

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import aiohttp
import numpy as np
import pytest
import torch
import zmq
import zmq.asyncio

from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.predictor import checkpoint, dataset, shards
from ares.predictor.networks import HazardNetwork
from ares.protocol import messages, rpc
from tests.integration.conftest import (
    FORKED,
    GPU_DEFAULTS,
    STOCK,
    TINY_FLAGS,
    Environments,
    one_core,
    recordings,
    row_of,
)

HIDDEN = 128


def offline(model: Path, data: Path, tolerance: float) -> dataset.Pairs:
    """Every recorded state against transformers' own forward pass over the same tokens."""
    from transformers import AutoModelForCausalLM

    pairs = dataset.load(data)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for output in np.unique(pairs.output):
        rows = pairs.output == output
        tokens = np.concatenate([pairs.prompt_tokens[output], pairs.output_tokens[output]]).astype(np.int64)
        with torch.no_grad():
            states = network.model(torch.from_numpy(tokens)[None]).last_hidden_state[0].numpy()
        expected = states[pairs.prompt_length[rows] - 1 + pairs.position[rows]]
        # Computed by two engines and stored in half precision; the states of neighbours differ by more than their size.
        error = np.linalg.norm(pairs.states[rows] - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() < tolerance
    return pairs


@pytest.fixture(scope="module")
def collected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"Tell me {n} things about the sea." for n in range(6)))
    command = [sys.executable, "-m", "ares", "predictor", "collect", "--prompts", prompts, "--out", folder / "data"]
    command += ["--model", tiny_model, "--limit", "60", "--every", "7", "--batch", "4"]
    for count in ("4", "6"):  # the second run goes on where the first ended
        done = subprocess.run(
            [*map(str, command), "--limit-prompts", count], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "data"


def test_collected_states_equal_transformers(tiny_model: Path, collected: Path) -> None:
    pairs = offline(tiny_model, collected, 0.1)  # bfloat16, through wide random weights
    assert len(pairs.requests) == len(set(pairs.requests)) == 6
    # At the end of prefill and after every seventh token, of which the last has a successor.
    for output in range(6):
        length = len(pairs.output_tokens[output])
        assert pairs.position[pairs.output == output].tolist() == list(range(0, length, 7))


def test_a_folder_is_not_continued_with_other_settings(tiny_model: Path, collected: Path) -> None:
    with pytest.raises(shards.PredictorError, match="every is 9"):
        shards.same_source(collected, shards.Source(str(tiny_model), HIDDEN, 9, 60, "temperature 0.7, top_p 1"))


def make_checkpoint(path: Path, model: str) -> None:
    torch.manual_seed(0)
    options = {"limit": 256, "members": 1, "width": 16, "first": 1}
    network = HazardNetwork(HIDDEN, **options)
    torch.nn.init.normal_(network.members[0].shift.weight, 0, 0.2)
    torch.nn.init.normal_(network.first.members[0].shift.weight, 0, 0.2)
    center, scale = torch.zeros(HIDDEN), torch.ones(HIDDEN)
    parts = (network, "ours", options, model, HIDDEN, shards.HIDDEN_STATE, 20, 256, center, scale)
    checkpoint.save(path, checkpoint.Checkpoint(*parts))


@pytest.fixture(scope="module")
def predicting(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    environment_of: Environments,
) -> Iterator[tuple[local.ManagedProcess, Path]]:
    """Run an instance with a predictor that also records everything."""
    folder = tmp_path_factory.mktemp("predicting")
    make_checkpoint(folder / "p.safetensors", str(tiny_model))
    flags = ("--predictor", folder / "p.safetensors", "--record-hidden-states", folder / "rec", "--record-fraction", 1)
    vllm_flags = tuple(local_flags(list(TINY_FLAGS)))
    settings = local.ClusterSettings(model=str(tiny_model), vllm_flags=vllm_flags, worker_module=FORKED)
    with mock.patch.dict(os.environ, environment_of(STOCK)), local.workers_only(settings) as cluster:
        cluster.start_worker("predicting", "both", one_core(), tuple(map(str, flags)))
        cluster.await_workers()
        yield cluster.workers[0], folder / "rec"


async def complete(url: str, model: str, prompt: str, tokens: int, **transfer: Any) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "kv_transfer_params": {"ares_key": f"k-{prompt}"} | transfer}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/v1/completions", json=body) as reply:
        found: list[int] = (await reply.json())["choices"][0]["token_ids"]
        return found


async def events(url: str) -> AsyncIterator[messages.Event]:
    """Yield what an instance tells a gateway."""
    async with aiohttp.ClientSession() as http, http.get(f"{url}/ares/v1/instance") as reply:
        address = (await reply.json())["control_address"]
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)
    await socket.send(rpc.encode(messages.Subscribe(0.02)))
    try:
        while True:
            yield rpc.decode_event(await socket.recv())
    finally:
        socket.close()


async def telemetry(url: str, rows: list[messages.Row]) -> None:
    async for event in events(url):
        if isinstance(event, messages.Telemetry):
            rows += event.rows


async def test_greedy_output_is_the_same_with_the_predictor(
    cluster: local.Cluster, predicting: tuple[local.ManagedProcess, Path], tiny_model: Path
) -> None:
    rows: list[messages.Row] = []
    watcher = asyncio.create_task(telemetry(predicting[0].url, rows))
    prompts = [f"Number {n}: a story" for n in range(4)]
    plain = cluster.workers[-1].url
    try:
        on = await asyncio.gather(*(complete(predicting[0].url, str(tiny_model), p, 200) for p in prompts))
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    off = await asyncio.gather(*(complete(plain, str(tiny_model), p, 200) for p in prompts))
    assert on == off
    predicted = [row for row in rows if row.remaining is not None]
    assert len({row.key for row in predicted}) == 4
    for row in predicted:
        assert row.remaining is not None
        low, middle, high = row.remaining
        assert 1 <= low <= middle <= high <= max(1, 200 - row.output)
        assert math.isfinite(high)


async def test_a_prefill_is_predicted_before_it_ends(
    predicting: tuple[local.ManagedProcess, Path], tiny_model: Path
) -> None:
    """The engine sleeps after a prefill: what is not told with its own step is never told."""
    url, model = predicting[0].url, str(tiny_model)
    told = await predictions_of_prefills(url, model, "A first prompt", "Another, a longer one, of the same kind")
    assert told.keys() == {"k-A first prompt", "k-Another, a longer one, of the same kind"}
    quantiles = [event.remaining for event in told.values()]
    assert len(set(quantiles)) == 2
    # A prefill's own limit of one token is not the request's.
    assert all(0 < low <= middle <= high and high > 1 for low, middle, high in quantiles)


async def predictions_of_prefills(
    url: str, model: str, *prompts: str, **transfer: Any
) -> dict[str, messages.Predicted]:
    """Prefill prompts for another instance; return what was predicted of each, by key."""
    told: dict[str, messages.Predicted] = {}

    async def listen() -> None:
        async for event in events(url):
            if isinstance(event, messages.Hello):
                listening.set()
            elif isinstance(event, messages.Predicted):
                told[event.key] = event
                if len(told) == len(prompts):
                    return

    listening = asyncio.Event()
    listener = asyncio.create_task(listen())
    try:
        await asyncio.wait_for(listening.wait(), 60)
        for prompt in prompts:
            await complete(url, model, prompt, 1, do_remote_decode=True, do_remote_prefill=False, **transfer)
        await asyncio.wait_for(listener, 60)
    finally:
        listener.cancel()
    return told


async def test_a_forecast_that_came_with_a_request_is_taken(
    predicting: tuple[local.ManagedProcess, Path], tiny_model: Path
) -> None:
    """That of another prompt changes what is predicted; that of its own does not."""
    url, model, prompt = predicting[0].url, str(tiny_model), "A prompt"
    told = await predictions_of_prefills(url, model, prompt, "Of the sea, of ships, and of those who sail them")
    made, others = told.values()
    assert made.forecast
    assert others.forecast != made.forecast
    (own,) = (await predictions_of_prefills(url, model, prompt, ares_first_forecast=made.forecast)).values()
    (another,) = (await predictions_of_prefills(url, model, prompt, ares_first_forecast=others.forecast)).values()
    for taken, came in ((own, made), (another, others)):
        assert taken.forecast.split(":")[:3] == came.forecast.split(":")[:3]
        # The average that came with it has this state in it, too.
        assert [text.forecast.split(":")[3] for text in (came, taken)] == ["1", "2"]
    assert own.remaining == pytest.approx(made.remaining, rel=0.02)
    assert another.remaining != pytest.approx(made.remaining, rel=0.02)


@pytest.fixture
def recording(request: pytest.FixtureRequest, cluster: local.Cluster) -> tuple[str, Path]:
    """Return the URL of an instance that records everything, and the folder."""
    if row_of(request.node) == GPU_DEFAULTS:
        return cluster.workers[-1].url, recordings(cluster)
    worker, folder = request.getfixturevalue("predicting")
    return worker.url, folder


@pytest.mark.gpu_defaults
async def test_live_states_equal_offline_ones(recording: tuple[str, Path], tiny_model: Path) -> None:
    """What the worker records of live requests is what transformers computes; it is written soon.

    With vLLM's defaults of a GPU, these are the requests of all tests before, moves and preemptions included.
    """
    url, folder = recording
    length = 125  # of no other output
    await asyncio.gather(*(complete(url, str(tiny_model), f"Live {n}", length) for n in range(3)))
    for _ in range(60):
        found = [shards.read(file).tensors["output_length"] for file in shards.files(folder)]
        if sum((lengths == length).sum() for lengths in found) == 3:
            break
        await asyncio.sleep(1)
    pairs = offline(tiny_model, folder, 2e-3)  # float32
    lengths = np.array([len(tokens) for tokens in pairs.output_tokens])
    ours = np.isin(pairs.output, np.flatnonzero(lengths == length))
    assert (lengths == length).sum() == 3
    assert sorted(set(pairs.position[ours])) == list(range(0, length, 20))
    assert pairs.censored[ours].all()  # all of them were cut by their limit


def test_a_checkpoint_that_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "p.safetensors", "another/model")
    command = [sys.executable, "-m", "ares", "worker", "--role", "decode", "--model", str(tiny_model)]
    command += ["--predictor", str(tmp_path / "p.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "another/model" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.dumps(str(tiny_model))[1:-1].split("/")[-1] in done.stderr.replace("\n", "")
