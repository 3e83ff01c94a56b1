"""Two models behind one address of two processes: each process answers for both, about both models."""

import asyncio
from pathlib import Path

import pytest

from tests.gateway.fakes import instances
from tests.gateway.gateways import hold, stop_holding
from tests.gateway.processes.service import serving_in_processes
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually_found

TOKENS = 60
PROMPT = list(range(10, 60))


@pytest.mark.timeout(240)
async def test_each_process_answers_for_both_about_both_models(model_folder: Path) -> None:
    models = [{"model": str(model_folder), "served_model_name": [name]} for name in ("one", "two")]
    async with (
        instances("prefill", "decode", vocabulary=VOCABULARY) as ones,
        instances("prefill", "decode", vocabulary=VOCABULARY) as twos,
    ):
        for fakes, name in ((ones, "one"), (twos, "two")):
            hold(fakes, 55)
            for fake in fakes:
                fake.models = [name]
        async with serving_in_processes([*ones, *twos], model_folder, models=models) as gateway:

            async def ready() -> bool:
                shown = [await gateway.status() for _ in range(2)]
                return all(row["why"] is None for status in shown for row in status["models"])

            await eventually_found(ready, 60)
            names = ["one"] * 4 + ["two"] * 3  # each process gets every second one
            streams = [gateway.stream(f"{model}-{n}", PROMPT, TOKENS, model=model) for n, model in enumerate(names)]
            await asyncio.gather(*(output.reach(2) for output, _ in streams))
            for status in [await gateway.status() for _ in range(2)]:
                assert sorted(row["model"] for row in status["requests"]) == names
                assert min(one["requests"] for one in status["processes"]) > 0
                assert [(row["name"], row["waiting"]) for row in status["models"]] == [("one", 0), ("two", 0)]
            assert await gateway.command("PUT", "preset", preset="static-rr") == 200
            stop_holding(ones)
            stop_holding(twos)
            outputs = await asyncio.wait_for(asyncio.gather(*(task for _, task in streams)), 60)
            assert [len(output.token_ids) for output in outputs] == [TOKENS] * 7
            for metrics in [await gateway.metrics() for _ in range(2)]:
                assert metrics['ares_output_tokens_total{model_name="one"}'] == 4 * TOKENS
                assert metrics['ares_output_tokens_total{model_name="two"}'] == 3 * TOKENS
                assert sum(value for name, value in metrics.items() if name.startswith("ares_instance_up{")) == 4
