"""The decision log of a gateway, decided again."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ares.gateway.records.replay import ReplayError, replay
from tests.gateway.gateways import (
    Client,
    cluster,
    teach,
)


async def test_the_log_decides_again(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with cluster(model_folder, decision_log=log, slo_ttft_s=1.0) as (gateway, _):
        teach(gateway, 300)
        clients = [Client(gateway, 100 + 60 * n, name=f"r{n}", prompt=[10 + n] * 60) for n in range(6)]
        for n, client in enumerate(clients):
            await client.finish()
            client.check(100 + 60 * n)
    again = replay(log, None)
    assert again.decisions > 5
    assert again.differences == []
    assert again.logged["admit"] == 6
    packed = tmp_path / "decisions.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + log.read_bytes()))
    assert replay(packed, None) == again
    other = replay(log, "static-rr")
    assert other.made["move"] == other.made["avoid_oom"] == 0
    with pytest.raises(ValueError, match="unknown preset"):
        replay(log, "fast")
    kinds = {json.loads(line)["kind"] for line in log.read_text().splitlines()}
    assert kinds == {"prefill", "admission", "moves"}


async def test_the_places_of_prompts_are_chosen_again(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    async with cluster(model_folder, decision_log=log, preset="ares-prefix") as (gateway, _):
        clients = [Client(gateway, 20, name=f"r{n}", prompt=[10 + n % 3] * 60) for n in range(12)]
        for client in clients:
            await client.finish()
    again = replay(log, None)
    assert again.differences == []
    assert again.logged["prefill"] == 12
    records = [json.loads(line) for line in log.read_text().splitlines()]
    places = [record["places"] for record in records if record["kind"] == "prefill"]
    assert any(any(place["cached_tokens"]) for place in places)
    assert any(any(place["decodes"]) for place in places)
    # One that is blind to prefixes never decodes where it prefills.
    blind = replay(log, "ares")
    assert blind.made["prefill"] == 12
    chosen = [difference["made"][0]["instance"] for difference in blind.differences if "prefill" in str(difference)]
    assert chosen == [0] * len(chosen)


@pytest.mark.parametrize(
    "change",
    [
        {"instances": ["a"]},
        {"open": [True]},
        {"cached_tokens": [-1, 0]},
        {"queued_tokens": [1 << 60, 0]},
        {"token_s": [-1.0, 1.0]},
        {"step_s": ["x", 0]},
        {"decodes": None},
        {"transfer_s": -1},
        {"more": 1},
    ],
)
async def test_broken_places_are_named(tmp_path: Path, change: dict[str, object]) -> None:
    log = tmp_path / "decisions.jsonl"
    zeros = [0, 0]
    names = ("requests", "cached_tokens", "queued_tokens", "base_s", "token_s", "step_s", "slack_s")
    places = dict.fromkeys(names, zeros) | {"instances": ["a", "b"], "open": [True, True], "decodes": [False, True]}
    record = {"kind": "prefill", "time": 1.0, "preset": "ares", "tokens": 5, "memory": {}}
    record |= {"prefill": {"name": "least_time", "settings": {}}, "decided": [], "places": places}
    log.write_text(json.dumps(record) + "\n")
    assert replay(log, None).decisions == 1
    log.write_text(json.dumps(record | {"places": places | change}) + "\n")
    with pytest.raises(ReplayError, match=r"decisions\.jsonl:1: not a logged decision"):
        replay(log, None)


def test_each_process_of_a_gateway_has_a_memory_of_its_own(tmp_path: Path) -> None:
    """Two processes choose in turns, and write into the same log."""
    names = ("requests", "cached_tokens", "queued_tokens", "base_s", "token_s", "step_s", "slack_s")
    zeros = [0, 0]
    places = dict.fromkeys(names, zeros) | {"instances": ["a", "b"], "open": [True] * 2, "decodes": [False] * 2}
    record: dict[str, Any] = {"kind": "prefill", "time": 1.0, "preset": "ares", "tokens": 5, "places": places}
    record |= {"prefill": {"name": "fewest_requests", "settings": {}}}

    def decision(memory: dict[str, float], instance: int) -> str:
        decided = [{"kind": "prefill", "index": 0, "instance": instance}]
        return json.dumps(record | {"memory": memory, "decided": decided}) + "\n"

    log = tmp_path / "decisions.jsonl"
    first, second = decision({}, 0), decision({"a": 1.0}, 1)
    log.write_text(first + first + second + second)
    assert replay(log, None).differences == []


@pytest.mark.parametrize("line", ["{", "{}", '{"kind": "moves", "preset": "ares", "decided": []}', "[1]"])
def test_a_broken_log_is_named(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(line + "\n")
    with pytest.raises(ReplayError, match=r"log\.jsonl:1: not a logged decision"):
        replay(log, None)
    with pytest.raises(ReplayError, match=r"nowhere: cannot be read"):
        replay(tmp_path / "nowhere", None)
