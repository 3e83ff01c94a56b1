"""Prefix caches of simulated instances: what they keep, what is pulled and computed, and that memory adds up."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ares.policy import PRESETS, preset
from ares.policy.admission import ForecastSettings
from ares.simulator.block_cache import cached_tokens, evict, leave_blocks, use_blocks
from ares.simulator.cluster import Outcome, Simulation
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.invariants import violations
from ares.simulator.loop import handle_events
from ares.simulator.moves import begin_move
from ares.simulator.profile import ProfileError
from ares.simulator.scenario import Scenario
from ares.simulator.state import State, allocate
from ares.traces import TraceError, Workload, read_trace
from ares.traces.workload import NamedBlocks
from tests.simulator.test_reference import small

BLOCK = 32  # two blocks of the instances


def named(prompts: list[list[int]]) -> NamedBlocks:
    first = np.cumsum([0, *(len(one) for one in prompts)])
    return NamedBlocks(BLOCK, np.array([name for one in prompts for name in one], np.int64), first)


def chats(prompts: list[list[int]], every_s: float = 5.0, output: int = 20) -> Workload:
    """Requests one after the other, each with these blocks and five tokens more."""
    count = len(prompts)
    tokens = np.array([len(one) * BLOCK + 5 for one in prompts], np.int64)
    return Workload(
        "made up", every_s * np.arange(count, dtype=float), tokens, np.full(count, output), blocks=named(prompts)
    )


def run(work: Workload, name: str = "static-least-loaded", decode: int = 1, prefill: int = 1, **more: Any) -> Outcome:
    profile = small(2048, bandwidth_bytes_s=1e6, kv_bytes_per_token=1000, latency_s=0.0)
    chosen = {"policy": preset(name), "error": ERROR_MODELS["exact"], "prefix_caching": True} | more
    policy = chosen.pop("policy")
    return Simulation(work, [profile] * decode, [profile] * prefill, policy, name, **chosen).run()


def bare(prompts: list[list[int]], slots: int) -> State:
    """One cache and nothing else."""
    blocks = named(prompts)
    state = allocate(len(prompts), 1, 0, 1, 16, cached_blocks=(len(blocks.names), slots))
    state.first_block[:], state.block_names[:] = blocks.first, blocks.names
    state.prompt[:] = np.diff(blocks.first) * BLOCK + 1
    state.parameters.cached_block_tokens = BLOCK
    return state


@given(
    prompts=st.lists(st.lists(st.integers(0, 30), max_size=6, unique=True), min_size=1, max_size=12),
    steps=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 20)), max_size=60),
)
def test_it_keeps_what_a_plain_list_keeps(prompts: list[list[int]], steps: list[tuple[int, int]]) -> None:
    """Against users in a dict and the unused in an ordered one, the oldest first."""
    state = bare(prompts, 12 * 6)
    users: dict[int, int] = {}
    unused: OrderedDict[int, None] = OrderedDict()
    running: set[int] = set()
    for number, room in steps:
        request = number % len(prompts)
        blocks = prompts[request]
        if request in running:
            running.remove(request)
            shared = leave_blocks(state, 0, request, len(blocks))
            for block in reversed(blocks):
                users[block] -= 1
                if not users[block]:
                    unused[block] = None
            assert shared == sum(users[block] > 0 for block in blocks)
        else:
            running.add(request)
            used = sum(users.get(block, 0) > 0 for block in blocks)
            assert use_blocks(state, 0, request, 0, len(blocks)) == used
            for block in blocks:
                unused.pop(block, None)
                users[block] = users.get(block, 0) + 1
        evict(state, 0, room)
        while len(unused) > room:
            unused.popitem(last=False)
        assert state.cache_unused[0] == len(unused)
        present = {block for block, count in users.items() if count} | set(unused)
        for index, one in enumerate(prompts):
            leading = next((n for n, block in enumerate(one) if block not in present), len(one))
            assert cached_tokens(state, 0, index) == leading * BLOCK


def test_a_turn_pulls_and_computes_what_is_new() -> None:
    work = chats([[1, 2], [1, 2, 3], [9]])
    outcome = run(work)
    state, plain = outcome.state, run(work, prefix_caching=False)
    assert state.current.prefill_cached_tokens == state.current.pull_cached_tokens == 2 * BLOCK
    assert state.current.pull_tokens == work.prompt_tokens.sum()
    saved = plain.first_token_s - outcome.first_token_s
    assert saved[[0, 2]] == pytest.approx([0, 0], abs=1e-9)
    assert saved[1] > 2 * BLOCK * 1000 / 1e6, "seconds of the transfer, and of the prefill"


def test_what_is_evicted_is_computed_again() -> None:
    fits, overflows = ([[n, n + 1] for n in range(10, 10 + 2 * count, 2)] for count in (20, 60))
    for between, found in ((fits, 2 * BLOCK), (overflows, 0)):
        assert run(chats([[1, 2], *between, [1, 2, 3]])).state.current.pull_cached_tokens == found


def test_without_repeated_blocks_caches_change_nothing() -> None:
    work = chats([[2 * n, 2 * n + 1] for n in range(40)], every_s=0.05, output=100)
    for name in ("static-least-loaded", "ares"):
        with_caches, without = (run(work, name, 2, 1, prefix_caching=on) for on in (True, False))
        np.testing.assert_array_equal(with_caches.finish_s, without.finish_s)


def test_running_requests_share_memory() -> None:
    """Requests with one beginning of 1,600 tokens fit beside each other; without caches, one after the other."""
    work = chats([[*range(50)]] * 12, every_s=0.001, output=60)
    most = {on: float(run(work, prefix_caching=on).kv_use.max()) for on in (True, False)}
    together = run(work)
    assert float(np.ptp(together.first_token_s)) < float(np.ptp(run(work, prefix_caching=False).first_token_s)) / 2
    assert most[True] <= 1.0
    assert violations(together, 2048) == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.tuples(st.floats(0, 20), st.integers(0, 5), st.integers(0, 12), st.integers(1, 31), st.integers(1, 300)),
        min_size=1,
        max_size=50,
    ),
    name=st.sampled_from(sorted(PRESETS)),
    prefill=st.integers(0, 2),
    failures=st.lists(st.tuples(st.floats(0.01, 25), st.integers(0, 2)), max_size=2, unique_by=lambda f: f[1]),
)
def test_memory_adds_up(
    rows: list[tuple[float, int, int, int, int]], name: str, prefill: int, failures: list[tuple[float, int]]
) -> None:
    """Whatever is shared, moved, preempted or lost: all memory is free in the end, and nobody uses a block."""
    rows = sorted(rows)
    prompts = [[0, *(100 * chat + n for n in range(1, blocks))][:blocks] for _, chat, blocks, _, _ in rows]
    work = Workload(
        "generated",
        np.array([row[0] for row in rows]),
        np.array([len(p) * BLOCK + row[3] for p, row in zip(prompts, rows, strict=True)], np.int64),
        np.array([row[4] for row in rows], np.int64),
        blocks=named(prompts),
    )
    decode = [small(1600), small(2048), small(1440)]
    outcome = Simulation(
        work, decode, [small(2400)] * prefill, preset(name), name, ERROR_MODELS["noise-60"], 0.25, 0, failures,
        prefix_caching=True,
    ).run()  # fmt: skip
    assert violations(outcome, 2400) == []
    state = outcome.state
    assert not state.cache_users.any()
    assert not state.used_blocks.any()
    assert not state.pinned_blocks.any()
    size = int(state.parameters.block_size)
    room = np.concatenate([state.total_blocks * size, state.prefill_free]) // BLOCK
    assert (state.cache_unused <= room).all()


def test_a_move_takes_along_what_is_cached_at_the_target() -> None:
    """A turn that runs on one instance, and moves to where the turn before it has run."""
    work = replace(chats([[*range(10)], [*range(10), 30]], output=1000), arrival_s=np.array([0.0, 60.0]))
    copied = {}
    for target in (0, 2):
        simulation = Simulation(
            work,
            [small(4096)] * 3,
            [small(4096)],
            preset("static-rr"),
            error=ERROR_MODELS["exact"],
            prefix_caching=True,
        )
        state = simulation.build()
        handle_events(state, 61.0)
        assert state.decode_instance[:2].tolist() == [0, 1], "they go round"
        assert begin_move(state, 1, target, 61.0)
        copied[target] = int(state.current.migrated_bytes)
        handle_events(state, np.inf)
        assert (state.moved[1], int(state.current.finished)) == (1, 2)
        assert not state.cache_users.any()
        assert (state.free == state.total_blocks).all()
    assert copied[2] - copied[0] == 10 * BLOCK * 50_000


def test_admission_brings_a_turn_to_where_it_is_cached() -> None:
    """Each chat's second turn; between them the chat of the other instance has ended, too."""
    chat_a, chat_b = [[*range(10)], [*range(10, 22)]]
    work = chats([chat_a, chat_b, [*chat_b, 30], [*chat_a, 31]], every_s=0.01, output=400)
    work = replace(work, arrival_s=np.array([0.0, 0.01, 60.0, 60.01]))
    found = {}
    for weight in (0.0, 1.0):
        policy = replace(PRESETS["ares"], admission_settings=ForecastSettings(cached_weight=weight))
        outcome = run(work, "ares", 2, 1, policy=policy)
        found[weight] = int(outcome.state.current.pull_cached_tokens)
    assert found[1.0] == 22 * BLOCK > found[0.0]


def test_presets_that_look_at_what_is_cached_find_more() -> None:
    work = chats([[100 * (n % 7) + k for k in range(2 + n // 7)] for n in range(35)], every_s=0.05, output=50)
    shares = {}
    for name in ("static-least-loaded", "least-time", "static-prefix", "ares-prefix"):
        state = run(work, name, 2, 2).state
        shares[name] = int(state.current.prefill_cached_tokens), int(state.current.pull_cached_tokens)
    least = shares.pop("static-least-loaded")
    assert all(prefill > least[0] for prefill, _ in shares.values()), shares
    assert all(shares[name][1] > least[1] for name in ("least-time", "ares-prefix")), (least, shares)


def test_blocks_are_read_from_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{{"timestamp": {}, "input_length": {}, "output_length": {}, "hash_ids": {}}}\n'
    rows = [(2000, 1100, 5, [7, 9, 8]), (0, 512, 5, [7]), (1000, 900, 0, [7, 1]), (3000, 100, 5, [4])]
    trace.write_text("".join(line.format(*row) for row in rows))
    blocks = read_trace(trace, with_blocks=True).blocks
    assert blocks is not None
    assert (blocks.tokens, blocks.names.tolist(), blocks.first.tolist()) == (512, [0, 0, 1], [0, 1, 3, 3])
    assert read_trace(trace).blocks is None
    again = read_trace(trace, with_blocks=True).repeated(5).blocks
    assert again is not None
    assert (again.names.tolist(), again.first.tolist()) == ([0, 0, 1, 2, 2, 3], [0, 1, 3, 3, 4, 6])
    trace.write_text('{"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": "x"}\n')
    with pytest.raises(TraceError, match="hash_ids are not a list"):
        read_trace(trace, with_blocks=True)
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,5,5\n")
    with pytest.raises(TraceError, match="does not name the blocks"):
        read_trace(trace, with_blocks=True)


def test_caches_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="names the blocks"):
        run(replace(chats([[1]]), blocks=None))
    with pytest.raises(ProfileError, match="multiples of 16"):
        run(replace(chats([[1]]), blocks=replace(named([[1]]), tokens=24)))
    scenario = Scenario("paper", None, None, 1, 2, "llama-8b-rtx4090", None, "exact", 1.0)
    assert replace(scenario, prefix_caching=True).policy("ares-prefix").sees_prefixes
