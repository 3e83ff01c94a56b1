"""Kills, drains and a soak, each very short, over simulated engines in processes of their own: nothing is lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from ares.bench import drain
from ares.free_ports import free_port
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares_dev import kills
from ares_dev.soak import plots
from ares_dev.soak.command import soak, violations

CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Cluster]:
    settings = local.ClusterSettings(
        model=DEFAULT_MODEL,
        port=free_port("127.0.0.1"),
        preset="off",
        log_folder=tmp_path_factory.mktemp("logs"),
        worker_flags=("--drain-deadline", "60"),
        simulate="llama-8b-rtx4090",
        per_process=1,
    )
    with local.running(settings, CONSOLE) as running:
        yield running


async def test_soak(cluster: local.Cluster, tmp_path: Path) -> None:
    figures, samples = await soak(cluster, seconds=4.0, users=8, interval_s=0.3, lull_s=1.0, console=CONSOLE)
    # A process's share of the pages that it has in common with others (PSS) grows where any of these ends, as processes
    # of this machine do all the time; over hours that is little, over seconds it is all there is. Its RSS does not.
    assert [what for what in violations(figures) if "/pss_mb grows" not in what] == []
    assert figures["moves"]["moved"] > 0
    assert figures["outputs"]["right"] > 5
    assert sum(sample.idle for sample in samples) >= 3
    watched = {row["series"] for row in figures["series"]}
    assert {"gateway/rss_mb", "gateway/tasks", "prefill-0/descriptors", "decode-1/kv_blocks_used"} <= watched
    plots.draw(samples, tmp_path / "soak.svg")
    assert (tmp_path / "soak.svg").stat().st_size > 1000


async def test_kills(cluster: local.Cluster) -> None:
    figures = await kills.measure(cluster, kills=1, prefill_kills=1, streams=4, tokens=160, console=CONSOLE)
    assert figures["requests_lost"] == figures["streams_with_other_tokens"] == figures["blocks_left"] == 0
    assert [kill["instance"] for kill in figures["decode_kills"]] == ["decode-0"]
    resumed = figures["decode"]["resumed"]
    assert resumed["count"] == sum(kill["streams"] for kill in figures["decode_kills"]) >= 1
    assert 0 < resumed["p50_ms"] <= resumed["max_ms"]
    assert figures["prefill"]["kills"] == 1


async def test_drain(cluster: local.Cluster) -> None:
    figures = await drain.measure(cluster, running=6, tokens=160, repeats=1, streams=4, console=CONSOLE)
    assert [turn["requests_there"] for turn in figures["turns"]] == [6, 6]
    assert figures["drains"]["streams"] == 12
    for ended in (figures["drains"], figures["rolling_restart"]):
        assert ended["requests_lost"] == ended["streams_with_other_tokens"] == 0
    assert [worker["instance"] for worker in figures["rolling_restart"]["workers"]] == ["decode-0", "decode-1"]
    assert figures["moves"]["moved"] >= 6
    assert figures["blocks_left"] == 0
