"""What policies see of a gateway's cluster, and the load by which a request is dispatched."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from ares.gateway.control.snapshot import SnapshotBuilder
from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.service import Gateway
from ares.policy import choose_instance, dispatcher
from ares.policy.kv_layout import KvGroup, KvLayout
from ares.protocol import messages
from tests.gateway.fakes import FakeInstance
from tests.gateway.gateways import (
    PROMPT,
    Client,
    find,
    view,
)
from tests.waiting import eventually


class Known(SimpleNamespace):
    """An instance; each is another one."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def instance(name: str, rows: list[messages.Row]) -> Any:
    hello = messages.Hello(name, "decode", "boot", messages.Peer("e", "h", 1), 128, 10, 2048, {})
    load = messages.Telemetry(1, 0, len(rows), 0, 0, 0.05, 9, 0, rows)
    state = SimpleNamespace(hello=hello, telemetry=load, capacity_tokens=1280, draining=False, layout=KvLayout(128))
    return Known(name=name, state=state, takes=lambda _: True)


def test_the_load_of_an_instance_is_its_blocks() -> None:
    """Memory runs out in blocks: three short requests leave less of it than two that are longer together."""
    short, long = instance("short", []), instance("long", [])
    pool: Any = SimpleNamespace(decode_instances=[short, long])
    own = [SimpleNamespace(instance=short, destination=None, tokens=130) for _ in range(3)]
    own += [SimpleNamespace(instance=None, destination=long, tokens=250) for _ in range(2)]
    sequences: Any = own
    view = SnapshotBuilder(pool, SimpleNamespace(), "g").build_loads(sequences)  # type: ignore[arg-type]
    assert view.cluster.promised_tokens.tolist() == [3 * 256, 2 * 256]
    assert choose_instance(dispatcher("least_loaded"), view.cluster, 100, None) == 1


def test_what_others_have_there_counts_in_blocks_too() -> None:
    theirs = [messages.Row("other/1", 130, 5, "running"), messages.Row("other/2", 1, 0, "running")]
    pool: Any = SimpleNamespace(decode_instances=[instance("shared", theirs)])
    view = SnapshotBuilder(pool, SimpleNamespace(), "g").build_loads([])  # type: ignore[arg-type]
    assert view.cluster.promised_tokens.tolist() == [256 + 128]


def test_sliding_windows_count_with_the_blocks_that_they_hold() -> None:
    hybrid = instance("hybrid", [messages.Row("other/1", 1000, 5, "running")])
    hybrid.state.layout = KvLayout.of(128, [KvGroup(128), KvGroup(128, window=256)])
    pool: Any = SimpleNamespace(decode_instances=[hybrid])
    view = SnapshotBuilder(pool, SimpleNamespace(), "g").build_loads([])  # type: ignore[arg-type]
    # 8 blocks of full attention, and of the window 3: tokens 745 to 1001 lie in as many.
    assert view.cluster.promised_tokens.tolist() == [(8 + 3) * 128]


async def test_the_view_of_the_policy(gateway: Gateway, fakes: list[FakeInstance]) -> None:
    for fake in fakes:
        fake.hold_at = len(PROMPT) + 10
    client = Client(gateway)
    sequence = await client.reached(10)
    stranger = "another-gateway/1/1"
    sampling, params = {"max_tokens": 50}, {"ares_key": stranger}
    body = {"token_ids": [7] * 30, "sampling_params": sampling, "kv_transfer_params": params}
    stream = await find(gateway, "decode-0").engine.stream(body)
    where = ["decode-0", "decode-1"].index(sequence.instance.name if sequence.instance else "")
    await eventually(lambda: len(view(gateway).cluster.requests) == 2)
    seen = view(gateway, {"decode-1"})
    cluster, found = seen.cluster, seen.instances
    assert [i.name for i in found] == list(cluster.instances) == ["decode-0", "decode-1"]
    assert cluster.capacity_tokens.tolist() == [16000] * 2
    assert cluster.open.tolist() == [True, False]
    assert cluster.requests == ("request", stranger)
    assert cluster.location.tolist() == [where, 0]
    assert cluster.resident_tokens.tolist() == [15, 30]
    assert cluster.movable.tolist() == [True, False]
    assert cluster.promised_tokens.tolist() == [0, 0]
    sequence.moved_at = asyncio.get_running_loop().time()
    assert not np.any(view(gateway).cluster.movable)  # cooling down
    stream.close()
    for fake in fakes:
        fake.hold_at = None
    await client.finish()


def test_what_another_process_has_placed_counts_before_it_is_reported() -> None:
    """The others' tokens beyond what the instance reports of them, and what those need that it does not report yet."""
    counts = SharedCounts(2)
    counts.begin(1, 1)
    counts.set_placed({"http://one:1": (512, 40)})
    counts.add_placed("http://one:1", 128, 60)
    sibling = counts.gateway
    counts.begin(0, 0)
    rows = [messages.Row(f"{sibling}/a/1", 130, 5, "running"), messages.Row("other/a/1", 130, 5, "running")]
    one, two = instance("one", rows), instance("two", [])
    one.url, two.url = "http://one:1", "http://two:1"
    for each in (one, two):
        each.state.step_time = SimpleNamespace(coefficients=None)
    pool: Any = SimpleNamespace(decode_instances=[one, two], restored_by_all=frozenset(), differing=dict)
    builder = SnapshotBuilder(pool, SimpleNamespace(), counts.gateway, counts)  # type: ignore[arg-type]
    # 640 tokens are placed, of which a row of 256 is reported; it counts as a row.
    assert builder.build([]).cluster.promised_tokens.tolist() == [640 - 256 + 100, 0]
    assert builder.build_loads([]).cluster.promised_tokens.tolist() == [640, 0]
    # What is reported of the sibling may be more than it has left.
    rows += [messages.Row(f"{sibling}/b/1", 1000, 5, "running")]
    assert builder.build([]).cluster.promised_tokens.tolist() == [100, 0]
