"""A run of engines that keep to a law exactly, token by token, in the form in which `ares bench live` saves runs."""

from dataclasses import asdict, dataclass, field

import numpy as np

from ares.bench.live.saved import Instance, Request, Sample, SavedRun, Sight
from ares.policy import preset

BASE_S, REQUEST_S, TOKEN_S = 0.02, 0.002, 1e-5
PREFILL_BASE_S, PREFILL_TOKEN_S = 0.05, 4e-4
HAND_OVER_S = 0.03
KV_BLOCKS, BLOCK = 400, 16


@dataclass
class Stream:
    name: str
    at_s: float
    prompt: int
    output: int
    joins_s: float
    times: list[float] = field(default_factory=list)


def decode(streams: list[Stream]) -> None:
    """Step by step: who has come joins the next step, and each step takes what the law says."""
    now, waiting, running = 0.0, sorted(streams, key=lambda each: each.joins_s), []
    while waiting or running:
        if not running:
            now = max(now, waiting[0].joins_s)
        while waiting and waiting[0].joins_s <= now:
            running.append(waiting.pop(0))
        resident = sum(each.prompt + len(each.times) for each in running)
        now += BASE_S + REQUEST_S * len(running) + TOKEN_S * resident
        for each in running:
            each.times.append(now)
        running = [each for each in running if len(each.times) < each.output]


def played(requests: int = 80, rate: float = 3.0, seed: int = 0) -> SavedRun:
    """Return a run of `static-rr` on one prefill and two decode instances."""
    generator = np.random.default_rng(seed)
    at, free, streams = 0.0, 0.0, []
    for number in range(requests):
        at += generator.exponential(1.0 / rate)
        prompt, output = int(generator.integers(20, 200)), int(generator.integers(20, 120))
        free = max(at, free) + PREFILL_BASE_S + PREFILL_TOKEN_S * prompt
        streams.append(Stream(f"r{number}", at, prompt, output, free + HAND_OVER_S, [free]))
    for instance in (0, 1):
        decode(streams[instance::2])
    samples = []
    for moment in np.arange(0.0, max(each.times[-1] for each in streams), 0.25).tolist():
        where = {
            each.name: Sight(f"decode-{number % 2}", "decode", sum(t <= moment for t in each.times))
            for number, each in enumerate(streams)
            if each.times[0] <= moment < each.times[-1]
        }
        samples.append(Sample(moment, where))
    sizes = {"capacity_tokens": KV_BLOCKS * BLOCK, "kv_blocks": KV_BLOCKS, "block_size": BLOCK}
    settings = {
        "preset": asdict(preset("static-rr")),
        "period_s": 0.5,
        "cooldown_s": 3.0,
        "slo_ttft_s": 10.0,
        "slo_tpot_s": 0.1,
        "slo_gap_s": None,
    }
    rows = [Instance("prefill-0", "prefill", **sizes)]
    rows += [Instance(f"decode-{number}", "decode", **sizes) for number in (0, 1)]
    return SavedRun("static-rr", [_request(each) for each in streams], [], samples, rows, settings, 0, 0)


def _request(each: Stream) -> Request:
    ticks = np.round((np.array(each.times) - each.at_s) * 1e4).astype(int)
    return Request(each.name, each.at_s, each.prompt, [int(ticks[0]), *np.diff(ticks).tolist()])
