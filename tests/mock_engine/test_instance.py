"""One instance as a gateway sees it: cuts, pins, releases, telemetry, with the real instance's semantics."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ares.gateway.pool.delta import Delta, EngineRefusedError
from ares.gateway.pool.stream import Stream
from ares.protocol import messages
from tests.mock_engine.cluster import MODEL, PROMPT, Cluster, serving, settings
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)
TIMEOUT_S = 30.0


@pytest.fixture
async def pair() -> AsyncIterator[Cluster]:
    async with serving(settings(), "decode", "decode") as cluster:
        yield cluster


async def start(cluster: Cluster, key: str, tokens: int = 5000, name: str = "decode-0", **more: Any) -> Stream:
    """Start a stream; `more` goes into its body, apart from what is meant for kv_transfer_params."""
    transfer = more.pop("transfer", {})
    sampling = {"max_tokens": tokens, "ignore_eos": True, **more.pop("sampling", {})}
    body = {"token_ids": PROMPT, "sampling_params": sampling, "kv_transfer_params": {"ares_key": key, **transfer}}
    return await cluster.known(name).engine.stream({**body, **more})


async def whole(stream: Stream) -> tuple[list[int], Delta]:
    """Return all tokens of a stream, and what it ended with."""
    tokens: list[int] = []
    last = Delta()
    async with asyncio.timeout(60):
        async for batch in stream.batches():
            for last in batch:
                tokens += last.token_ids or []
    stream.close()
    return tokens, last


async def generated(cluster: Cluster, count: int, name: str = "decode-0") -> None:
    await eventually(lambda: cluster.counters(name)["tokens"] >= count)


async def cut(cluster: Cluster, key: str, name: str = "decode-0") -> messages.CutResult:
    return await cluster.known(name).control.cut(key, TIMEOUT_S)


async def test_a_cut_ends_the_request_and_pins_what_is_computed(pair: Cluster) -> None:
    stream = await start(pair, "a")
    await generated(pair, 40)
    handover = await cut(pair, "a")
    tokens, last = await whole(stream)
    assert handover.outcome == "pinned"
    assert (last.finish_reason, last.stop_reason) == ("length", "migrated")
    assert handover.output_tokens == len(tokens)
    assert handover.tail == tokens[-64:]
    assert tokens == MODEL.continuation(PROMPT, len(tokens))
    # The newest token's KV is not computed.
    assert handover.kv_transfer_params["remote_num_tokens"] == len(PROMPT) + len(tokens) - 1
    counters = pair.counters("decode-0")
    assert (counters["pinned"], counters["kv_blocks_used"]) == (1, -(-(len(PROMPT) + len(tokens) - 1) // 16))
    await pair.known("decode-0").control.release("a")
    await pair.at_rest()
    assert pair.counters("decode-0")["pins_released"] == 1


async def test_a_cut_of_nobody_and_a_second_cut_change_nothing(pair: Cluster) -> None:
    assert (await cut(pair, "nobody")).outcome == "unknown"
    pair.instance("decode-0").faults.change(b'{"slow": 100}')
    stream = await start(pair, "a")
    await eventually(lambda: pair.counters("decode-0")["running"] == 1)
    outcomes = [handover.outcome for handover in await asyncio.gather(cut(pair, "a"), cut(pair, "a"))]
    assert sorted(outcomes) == ["not_running", "pinned"]
    stream.close()


async def test_a_request_that_does_not_sample_is_not_cut() -> None:
    async with serving(settings(max_num_seqs=1), "decode") as cluster:
        first, second = await start(cluster, "first"), await start(cluster, "second", 5)
        await eventually(lambda: cluster.counters("decode-0")["waiting"] == 1)
        assert (await cut(cluster, "second")).outcome == "not_running"
        first.close()
        tokens, _ = await whole(second)
        assert tokens == MODEL.continuation(PROMPT, 5)
        await cluster.at_rest()


async def test_a_prompt_in_chunks_is_not_cut() -> None:
    async with serving(settings(max_num_batched_tokens=1), "decode") as cluster:
        cluster.instance("decode-0").faults.change(b'{"slow": 20}')
        stream = await start(cluster, "a", 3)
        await eventually(lambda: cluster.counters("decode-0")["running"] == 1)
        assert (await cut(cluster, "a")).outcome == "not_running"
        stream.close()
        await cluster.at_rest()


async def test_a_cut_in_the_last_step_pins_nothing(pair: Cluster) -> None:
    pair.instance("decode-0").faults.change(b'{"slow": 300}')
    stream = await start(pair, "a", 2)
    await eventually(lambda: pair.counters("decode-0")["running"] == 1)
    # It arrives in the first step and is carried out as the second one, which is the last, begins.
    handover = await cut(pair, "a")
    tokens, last = await whole(stream)
    assert (handover.outcome, handover.output_tokens, handover.kv_transfer_params) == ("finished", 2, {})
    assert (len(tokens), last.finish_reason, last.stop_reason) == (2, "length", None)
    await pair.at_rest()


async def test_a_client_that_leaves_during_a_cut_is_answered(pair: Cluster) -> None:
    pair.instance("decode-0").faults.change(b'{"slow": 300}')
    stream = await start(pair, "a")
    await eventually(lambda: pair.counters("decode-0")["running"] == 1)
    answer = asyncio.create_task(cut(pair, "a"))
    await eventually(lambda: next(iter(pair.instance("decode-0").requests.values())).cut is not None)
    stream.close()
    assert (await answer).outcome == "finished"
    pair.instance("decode-0").faults.change(b'{"slow": 1}')
    await pair.at_rest()


async def test_a_release_before_the_end_keeps_it_from_being_pinned(pair: Cluster) -> None:
    stream = await start(pair, "a", 60, transfer={"do_remote_decode": True})
    await generated(pair, 5)
    await pair.known("decode-0").control.release("a")
    await whole(stream)
    await pair.at_rest()
    assert pair.counters("decode-0")["pins_made"] == 0


async def prefilled(cluster: Cluster, key: str, name: str = "decode-0") -> tuple[list[int], dict[str, Any]]:
    """Prefill; return the first token and the transfer."""
    sampling, params = {"max_tokens": 1, "ignore_eos": True}, {"ares_key": key, "do_remote_decode": True}
    body = {"token_ids": PROMPT, "sampling_params": sampling, "kv_transfer_params": params}
    delta, transfer = await cluster.known(name).engine.complete(body)
    assert transfer is not None
    return delta.token_ids or [], transfer


async def test_a_lease_that_ends_frees_the_pin_once_and_the_pull_fails() -> None:
    async with serving(settings(lease_s=0.3), "decode", "decode") as cluster:
        first, transfer = await prefilled(cluster, "a")
        await cluster.at_rest()
        assert cluster.counters("decode-0")["pins_expired"] == 1
        await cluster.known("decode-0").control.release("a")
        params = {**transfer, "ares_generated": 1}
        stream = await start(cluster, "b", 20, "decode-1", transfer=params, token_ids=PROMPT + first)
        tokens, _ = await whole(stream)
        assert first + tokens == MODEL.continuation(PROMPT, 21)
        admitted = await cluster.known("decode-1").control.until_kv_received("b", TIMEOUT_S)
        assert admitted is not None
        assert (admitted.pulled, admitted.failed) == (0, True)
        await cluster.at_rest()


async def test_a_request_that_waits_keeps_the_lease_of_what_it_will_pull() -> None:
    async with serving(settings(lease_s=0.6, max_num_seqs=1), "decode", "decode") as cluster:
        first, transfer = await prefilled(cluster, "a")
        busy = await start(cluster, "busy", name="decode-1")
        await generated(cluster, 1, "decode-1")
        stream = await start(
            cluster, "b", 20, "decode-1", transfer={**transfer, "ares_generated": 1}, token_ids=PROMPT + first
        )
        await asyncio.sleep(1.5)  # two leases and a half
        busy.close()
        assert first + (await whole(stream))[0] == MODEL.continuation(PROMPT, 21)
        admitted = await cluster.known("decode-1").control.until_kv_received("b", TIMEOUT_S)
        assert admitted is not None
        assert (admitted.pulled, admitted.failed) == (len(PROMPT), False)
        assert admitted.queued_s > 1.0
        await cluster.at_rest()


async def test_whoever_leaves_before_it_has_pulled_frees_the_source() -> None:
    async with serving(settings(max_num_seqs=1), "decode", "decode") as cluster:
        first, transfer = await prefilled(cluster, "a")
        busy = await start(cluster, "busy", name="decode-1")
        await generated(cluster, 1, "decode-1")
        stream = await start(cluster, "b", 20, "decode-1", transfer=transfer, token_ids=PROMPT + first)
        await eventually(lambda: cluster.counters("decode-1")["waiting"] == 1)
        stream.close()
        busy.close()
        await cluster.at_rest()
        assert cluster.counters("decode-0")["pins_pulled"] == 1


async def test_whoever_leaves_while_it_pulls_frees_both_sides() -> None:
    async with serving(settings(latency_s=0.3), "decode", "decode") as cluster:
        first, transfer = await prefilled(cluster, "a")
        stream = await start(cluster, "b", 20, "decode-1", transfer=transfer, token_ids=PROMPT + first)
        await eventually(lambda: cluster.counters("decode-1")["loading"] == 1)
        stream.close()
        await cluster.at_rest()
        assert cluster.counters("decode-0")["pins_pulled"] == 1


async def test_kv_of_other_tokens_gives_other_tokens(pair: Cluster) -> None:
    first, transfer = await prefilled(pair, "a")
    other = [*PROMPT[:-1], 999, *first]
    tokens, _ = await whole(await start(pair, "b", 20, "decode-1", transfer=transfer, token_ids=other))
    assert tokens != MODEL.continuation(other, 20)


async def test_telemetry_means_what_it_means_on_a_real_instance() -> None:
    async with serving(settings(max_num_seqs=1), "decode") as cluster:
        length = {"ares_mock_output_tokens": 3000}
        running = await start(cluster, "runs", sampling={"ignore_eos": False, "extra_args": length})
        await generated(cluster, 1)
        waiting = await start(cluster, "waits")

        def load() -> messages.Telemetry:
            found = cluster.known("decode-0").state.telemetry
            assert found is not None
            return found

        await eventually(lambda: len(load().rows) == 2 and all(row.output > 10 for row in load().rows[:1]))
        row, other = load().rows
        assert (row.key, row.state, row.resident) == ("runs", "running", len(PROMPT) + row.output)
        assert row.remaining == (3000.0 - row.output,) * 3
        assert (other.key, other.state, other.resident, other.output, other.remaining) == (
            "waits",
            "waiting",
            0,
            0,
            None,
        )
        assert (load().running, load().waiting, load().pinned) == (1, 1, 0)
        assert load().kv_blocks_used in {-(-row.resident // 16), -(-(row.resident + 1) // 16)}
        assert load().step_time_s > 0.002
        assert load().busy_s == pytest.approx(load().steps * load().step_time_s, rel=0.9)
        running.close()
        waiting.close()
        await cluster.at_rest()


async def test_predictions_err_as_told_and_keep_their_error_when_a_request_moves() -> None:
    async with serving(settings(prediction_error=0.5), "decode", "decode") as cluster:
        run = cluster.run(10000, ignore_eos=False, extra_args={"ares_mock_output_tokens": 600})
        medians = []
        for name in ("decode-0", "decode-1"):
            seen: list[float] = []

            def look(name: str = name, seen: list[float] = seen) -> bool:
                load = cluster.known(name).state.telemetry
                rows = [row for row in load.rows if row.remaining and row.output > 5] if load else []
                seen += [row.remaining[1] / (600 - (row.resident - len(PROMPT))) for row in rows if row.remaining]
                return bool(seen)

            await eventually(look)
            medians.append(seen[0])
            if name == "decode-0":
                assert await run.move("decode-1") == "moved"
        assert medians[0] == pytest.approx(medians[1])
        assert medians[0] != pytest.approx(1.0)
        run.task.cancel()
        await cluster.at_rest()


async def test_min_tokens_stop_tokens_and_log_probabilities() -> None:
    async with serving(settings(), "decode") as cluster:
        output = MODEL.continuation(PROMPT, 50)
        stop = output[20]
        tokens, last = await whole(await start(cluster, "a", sampling={"stop_token_ids": [stop], "logprobs": 2}))
        assert tokens == output[: output.index(stop) + 1]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
        assert last.logprobs is not None
        assert last.logprobs.content is not None
        assert [position.token_id for position in last.logprobs.content] == [stop]
        length = {"ares_mock_output_tokens": 3}
        tokens, last = await whole(
            await start(cluster, "b", sampling={"ignore_eos": False, "extra_args": length, "min_tokens": 7})
        )
        assert tokens == [*output[:6], MODEL.stop]
        assert (last.finish_reason, last.stop_reason) == ("stop", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": None}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [10**6]}, "vocabulary"),
        ({"token_ids": [1] * 20000}, "maximum context length"),
        ({"sampling_params": {"max_tokens": 0}}, "max_tokens"),
        ({"sampling_params": {"max_tokens": 2, "min_tokens": 3}}, "min_tokens"),
        ({"sampling_params": {"n": 2}}, "n must be 1"),
        ({"sampling_params": {"extra_args": {"ares_mock_output_tokens": -1}}}, "positive integer"),
        ({"sampling_params": 7}, "sampling_params"),
        ({"priority": 1 << 70}, "priority"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "remote_engine_id"),
        ({"kv_transfer_params": {"ares_generated": 1 << 40}}, "ares_generated"),
        ({"kv_transfer_params": {"ares_key": 5}}, "ares_key"),
        ({"kv_transfer_params": [1]}, "kv_transfer_params"),
    ],
)
async def test_what_makes_no_sense_is_refused(pair: Cluster, change: dict[str, Any], words: str) -> None:
    body = {"token_ids": PROMPT, "sampling_params": {}, **change}
    with pytest.raises(EngineRefusedError, match=words) as refused:
        await pair.known("decode-0").engine.stream(body)
    assert refused.value.status == 400
    await pair.at_rest()
