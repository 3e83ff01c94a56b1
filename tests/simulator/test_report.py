"""The page of `ares simulate --report`: what it says, of runs that are made up."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ares.simulator.moves import MoveRecord
from ares.simulator.report import duration, write_report

SLO: dict[str, Any] = {"ttft_s": 20.0, "tpot_s": 0.03, "gap_s": 2.0}


def outcome(preset: str, decode: int = 4, requests: int = 200, seed: int = 1) -> Any:
    random = np.random.default_rng(seed)
    arrival = np.sort(random.uniform(0, 1000, requests))
    output = random.integers(2, 2000, requests)
    first = arrival + random.exponential(3, requests)
    samples = np.arange(0.0, 1200.0, 0.5)
    return SimpleNamespace(
        preset=preset,
        workload=SimpleNamespace(arrival_s=arrival, output_tokens=output),
        first_token_s=first,
        finish_s=first + output * random.uniform(0.015, 0.04, requests),
        longest_gap_s=random.exponential(0.3, requests),
        sample_s=samples,
        kv_use=np.clip(random.normal(0.6, 0.2, (len(samples), decode)), 0, 1),
        queued=random.poisson(5, len(samples)),
        moves=[MoveRecord(100.0, 7, 0, decode - 1, "peak 1.10 <b> -> 0.92")] if preset == "ares" else [],
    )


def result(*presets: str) -> dict[str, Any]:
    spread = {"p50": 0.0123456, "p99": 1234.5}
    run = {"ttft_s": spread, "tpot_s": spread, "longest_gap_s": spread, "goodput_rps": 1.23456, "slo_share": 0.98765}
    runs = [run | {"preset": name, "load": 1.0, "preemptions": 12345, "migrations": 0} for name in presets]
    return {"runs": runs, "slo": SLO, "scenario": {"trace": "paper"}, "provenance": {"version": "0"}}


def page(folder: Path, *outcomes: Any, **options: Any) -> str:
    return write_report(folder, result(*(one.preset for one in outcomes)), list(outcomes), **options).read_text()


def test_maps_have_names_times_and_a_scale(tmp_path: Path) -> None:
    text = page(tmp_path, outcome("ares"), outcome("static-rr"))
    maps = re.findall(r"<svg viewBox.*?</svg>", text, re.DOTALL)
    scale, ares, static = [re.findall(r"<text[^>]*>(.*?)</text>", drawn) for drawn in maps]
    assert scale == ["0 %", "50 %", "100 %"]
    assert [label for label in ares if "decode" in label] == [f"decode-{number}" for number in range(4)]
    assert ares == static
    assert ares[-1] == "time, s"
    assert {"0", "1,000"} < set(ares)
    (arrow,) = re.findall(r"<line class='move'.*?</line>", text)
    assert "<title>100.0 s: request 7, decode-0 to decode-3; peak 1.10 &lt;b&gt; -&gt; 0.92</title>" in arrow


def test_of_many_instances_as_many_names_as_there_is_room_for(tmp_path: Path) -> None:
    text = page(tmp_path, outcome("ares", decode=128))
    named = [int(name) for name in re.findall(r">decode-(\d+)</text>", text)]
    assert named[:2] == [0, 5]
    assert len(named) == 26


def test_one_load_makes_no_curves_and_several_do(tmp_path: Path) -> None:
    alone = page(tmp_path, outcome("ares"))
    assert "Load curves need several loads" in alone
    points = [run | {"load": load} for run in result("ares")["runs"] for load in (0.5, 1.0)]
    swept = page(tmp_path, outcome("ares"), swept={"points": points, "slo": SLO})
    assert "Load curves need several loads" not in swept
    assert swept.count("<svg") == alone.count("<svg") + 1


def test_numbers_are_read_without_counting_digits(tmp_path: Path) -> None:
    text = page(tmp_path, outcome("ares"))
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells[:11] == [
        "ares", "1.00", "12.3 ms", "1,234 s", "12.3 ms", "1,234 s", "1,234 s", "1.23", "98.8%", "12,345", "0",
    ]  # fmt: skip
    shown = [duration(seconds) for seconds in (0.00123, 0.5, 0.99999, 1.5, 59.94, 998.6, float("nan"))]
    assert shown == ["1.23 ms", "500 ms", "1 s", "1.5 s", "59.9 s", "999 s", "\N{EN DASH}"]


def test_it_says_what_load_means_and_what_made_it_and_fits_a_phone(tmp_path: Path) -> None:
    text = page(tmp_path, outcome("ares"), command="ares simulate --trace '<x>'")
    assert "Load is the arrival rate as a multiple of the cluster" in text
    assert "<pre>ares simulate --trace &#x27;&lt;x&gt;&#x27;</pre>" in text
    assert "width=device-width" in text
    for title in ("share of requests by TTFT", "requests that wait for admission"):
        assert f"<!-- {title} -->" in text


@pytest.mark.parametrize("gap", [2.0, "none"])
def test_a_run_of_one_request(tmp_path: Path, gap: float | str) -> None:
    made = result("ares")
    made["slo"] = SLO | {"gap_s": gap}
    one = outcome("ares", requests=1)
    one.kv_use, one.sample_s, one.queued = one.kv_use[:1], one.sample_s[:1], one.queued[:1]
    assert "decode-0" in write_report(tmp_path, made, [one]).read_text()
