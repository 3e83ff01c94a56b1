"""Prefill instances with prefix caches: what is cached, what it saves, and which policy finds it."""

import json
import random
from pathlib import Path

import pytest

from ares.policy import prefill_policy
from ares.simulator.prefix_caches import Instance, PrefillPool, at_load, compare, ideal_share, prefill_s
from ares.simulator.profile import Profile, StepTimeModel
from ares.traces import TraceError
from ares.traces.prompt_blocks import Prompt, read_prompts

BLOCK = 512
PROFILE = Profile(
    name="test",
    model="test",
    source="made up",
    kv_tokens=100 * BLOCK,
    kv_bytes_per_token=1000,
    max_num_batched_tokens=2048,
    step=StepTimeModel(base_s=0.01, per_request_s=0, per_resident_token_s=0, per_prefill_token_s=1e-3),
)


def run(prompts: list[Prompt], name: str = "fewest_requests", count: int = 1) -> tuple[list[float], float]:
    ttft, share = PrefillPool(prompts, BLOCK, PROFILE, count, prefill_policy(name)).run()
    return ttft.tolist(), share


def test_prompts_queue_and_what_is_cached_is_not_computed_again() -> None:
    first, second = Prompt(0.0, 1024, (1, 2)), Prompt(0.5, 1536, (1, 2, 3))
    alone = prefill_s(PROFILE, 0, 1024)
    assert alone == pytest.approx(0.01 + 1.024)
    assert prefill_s(PROFILE, 0, 5000) == pytest.approx(3 * 0.01 + 5.0)
    ttft, share = run([first, second])
    assert ttft == pytest.approx([alone, alone - 0.5 + prefill_s(PROFILE, 1024, 1536)])
    assert share == pytest.approx(1024 / 2560)
    again = run([first, Prompt(10.0, 1024, (1, 2))])[0][1]
    assert again == pytest.approx(prefill_s(PROFILE, 512, 1024)), "the last token is always computed"


def test_the_least_recently_used_blocks_leave() -> None:
    instance = Instance(3)
    instance.keep((1, 2))
    instance.keep((1, 3, 4))
    assert list(instance.cache) == [4, 3, 1]
    assert instance.leading((1, 2), known=True) == 1
    instance.sent[2] += 1
    assert (instance.leading((1, 2), known=True), instance.leading((1, 2), known=False)) == (2, 1)


def chats(count: int) -> list[Prompt]:
    """Conversations of five turns, one token of answer in a thousand."""
    generator, made, block = random.Random(1), [], 0
    for _ in range(count):
        begun, blocks = generator.uniform(0, 100), list[int]()
        for turn in range(5):
            new = generator.randint(1, 3)
            blocks += range(block, block + new)
            block += new
            made.append(Prompt(begun + 8 * turn, len(blocks) * BLOCK, tuple(blocks)))
    return sorted(made, key=lambda prompt: prompt.arrival_s)


def test_least_time_finds_what_the_longest_prefix_finds_and_does_not_wait_for_it() -> None:
    names = ["round_robin", "fewest_requests", "longest_prefix", "least_time"]
    result = compare(chats(40), BLOCK, PROFILE, 3, names, [0.5, 1.0, 1.5])
    by_load: dict[float, dict[str, dict[str, float]]] = {}
    for one in result["runs"]:
        by_load.setdefault(one["load"], {})[one["prefill"]] = one["ttft_s"] | {"hits": one["hit_rate"]}
    for seen in by_load.values():
        assert seen["least_time"]["p50"] <= 1.2 * min(seen[name]["p50"] for name in names)
        assert seen["least_time"]["p99"] <= 1.01 * min(seen[name]["p99"] for name in names)
        assert seen["least_time"]["hits"] > 0.98 * seen["longest_prefix"]["hits"] > 1.5 * seen["round_robin"]["hits"]
        assert all(one["hits"] <= result["ideal_hit_rate"] for one in seen.values())


def test_load_and_ideal() -> None:
    prompts = [Prompt(0.0, 1024, (1, 2)), Prompt(4.0, 1030, (1, 2, 3))]
    assert ideal_share(prompts, BLOCK) == pytest.approx(1024 / 2054)
    scaled = at_load(prompts, PROFILE, 2, 0.5)
    work = prefill_s(PROFILE, 0, 1024) + prefill_s(PROFILE, 0, 1030)
    assert [prompt.arrival_s for prompt in scaled] == pytest.approx([0.0, work / 2 / 0.5])
    with pytest.raises(TraceError, match="all prompts arrive at once"):
        at_load(prompts[:1], PROFILE, 1, 1.0)


def test_traces_that_name_blocks_are_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [1, 3]},
        {"timestamp": 1000, "input_length": 1000, "output_length": 0, "hash_ids": [1, 2]},
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(trace) == ([Prompt(0.0, 1000, (1, 2)), Prompt(2.0, 600, (1, 3))], 512)
    assert len(read_prompts(trace, 1)[0]) == 1
    trace.write_text(json.dumps({**rows[0], "hash_ids": None}))
    with pytest.raises(TraceError, match="hash_ids"):
        read_prompts(trace)
    for wrong in (
        {"timestamp": float("nan")},
        {"input_length": float("inf")},
        {"input_length": -1},
        {"timestamp": None},
    ):
        trace.write_text(json.dumps({**rows[0], **wrong}))
        with pytest.raises(TraceError, match=r"trace.jsonl:1: (negative or infinite|no column)"):
            read_prompts(trace)
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,5,5\n")
    with pytest.raises(TraceError, match="does not name the blocks"):
        read_prompts(trace)


def test_a_shared_prefix_does_not_hold_all_prompts_on_one_instance() -> None:
    """Agents with one system prompt: computing it again once is cheaper than a queue behind the first instance."""
    agents = [Prompt(float(n), 8 * BLOCK + 16, (*range(8), 100 + n)) for n in range(600)]
    result = compare(agents, BLOCK, PROFILE, 4, ["fewest_requests", "least_time"], [20.0])
    fewest, least_time = (one["ttft_s"] for one in result["runs"])
    assert least_time["p50"] <= 1.1 * fewest["p50"]
    assert least_time["p99"] <= 2.5 * fewest["p99"]
