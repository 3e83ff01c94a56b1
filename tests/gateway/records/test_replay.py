"""The decision log of a gateway, decided again."""

import gzip
import json
from pathlib import Path

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
    assert kinds == {"admission", "moves"}


@pytest.mark.parametrize("line", ["{", "{}", '{"kind": "moves", "preset": "ares", "decided": []}', "[1]"])
def test_a_broken_log_is_named(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(line + "\n")
    with pytest.raises(ReplayError, match=r"log\.jsonl:1: not a logged decision"):
        replay(log, None)
    with pytest.raises(ReplayError, match=r"nowhere: cannot be read"):
        replay(tmp_path / "nowhere", None)
