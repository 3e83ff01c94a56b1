"""A worker of NVIDIA Dynamo that computes nothing, for `ares bench relay --dynamo`.

It is run as a file, by an interpreter that has Dynamo and need not have ARES. What it generates is what the mock
engines of the other systems do: the same text over and over, a token of every request in each step.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

_PAUSED_S = 0.01


class Worker:
    """Answers requests for tokens.

    Parameters
    ----------
    ids
        Token ids of the text.
    pace
        A file with the seconds between two steps; 0: as fast as they are read.
    """

    def __init__(self, ids: list[int], pace: Path) -> None:
        self._ids = ids
        self._pace = pace
        self._step = asyncio.Event()

    async def run_steps(self) -> None:
        """Let all requests go on together, once a step."""
        due = asyncio.get_running_loop().time()
        while True:
            due = max(due + (self._interval_s() or _PAUSED_S), asyncio.get_running_loop().time())
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            step, self._step = self._step, asyncio.Event()
            step.set()

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the tokens of a request, one at a time."""
        count = request["stop_conditions"]["max_tokens"]
        paced = self._interval_s() > 0
        for n in range(count):
            if paced and n:
                await self._step.wait()
            token = {"token_ids": [self._ids[n % len(self._ids)]]}
            yield token if n < count - 1 else {**token, "finish_reason": "length"}

    def _interval_s(self) -> float:
        return float(self._pace.read_text() or 0)  # empty while it is being written


async def _serve(folder: str, model: str, ids: list[int], pace: Path) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq", response_plane="tcp")
    endpoint = runtime.endpoint("relay.backend.generate")
    worker = Worker(ids, pace)
    kinds = ModelType.Chat | ModelType.Completions
    await register_model(
        ModelInput.Tokens, kinds, endpoint, folder, model, worker_type=WorkerType.Aggregated, ignore_weights=True
    )
    steps = asyncio.create_task(worker.run_steps())
    try:
        await endpoint.serve_endpoint(worker.generate)
    finally:
        steps.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a Dynamo worker that computes nothing.")
    parser.add_argument("--folder", required=True, help="model folder: the frontend reads its tokenizer")
    parser.add_argument("--model", required=True, help="name of the model")
    parser.add_argument("--ids", required=True, help="token ids to generate, separated by commas")
    parser.add_argument("--pace", type=Path, required=True, help="file with the seconds between two steps")
    given = parser.parse_args()
    asyncio.run(_serve(given.folder, given.model, [int(token) for token in given.ids.split(",")], given.pace))
