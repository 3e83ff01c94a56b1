"""The messages between gateway and instances: they arrive as they were sent, and anything else is refused."""

import msgspec
import pytest

from ares.protocol import messages, rpc

PEER = messages.Peer(engine_id="e", host="h", port=1, tp_size=2)
COMMANDS: list[messages.Command] = [
    messages.Subscribe(0.1),
    messages.Connect([PEER]),
    messages.Cut(7, "nonce/2"),
    messages.Release("nonce/2"),
    messages.Expect("nonce/2", 2.0),
    messages.Drain(True),
    messages.Drain(True, 60.0),
    messages.ChangeRole(7, "prefill", 60.0),
    messages.Lease(7, "gateway", 3.0),
    messages.FollowKvEvents(7),
]
EVENTS: list[messages.Event] = [
    messages.Hello("d0", "decode", "boot", PEER, 16, 100, 4096, {"vllm": "0"}),
    messages.Telemetry(1, 2, 3, 4, 5, 0.01, 6, 7, [messages.Row("nonce/2", 10, 3, "running")]),
    messages.KvReceived("nonce/2", 10, failed=False),
    messages.Predicted("nonce/2", (1.0, 20.5, 300.0)),
    messages.Predicted("nonce/3", (1.0, 20.5, 300.0), "network:0:AAA="),
    messages.CutResult(7, "nonce/2", "pinned", 3, [1, 2, 3], {"remote_block_ids": [[1, 2]], "remote_num_tokens": 9}),
    messages.LeaseResult(7, "gateway", granted=False),
    messages.RoleResult(7, "decode", "prefill"),
    messages.KvEvents(7, 3, [b"batch", b""]),
    messages.StepTokens([messages.NewTokens("gateway/nonce/1", 7, [1, 2])]),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: type(c).__name__)
def test_commands_arrive_as_they_were_sent(command: messages.Command) -> None:
    assert rpc.decode_command(rpc.encode(command)) == command
    with pytest.raises(msgspec.ValidationError):
        rpc.decode_event(rpc.encode(command))


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: type(e).__name__)
def test_events_arrive_as_they_were_sent(event: messages.Event) -> None:
    assert rpc.decode_event(rpc.encode(event)) == event
    with pytest.raises(msgspec.ValidationError):
        rpc.decode_command(rpc.encode(event))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_blocks_used": -1},
        {"running": 1 << 62},
        {"steps": -5},
        {"step_time_s": float("nan")},
        {"busy_s": float("inf")},
        {"drain_left_s": float("nan")},
        {"drain_left_s": -0.1},
        {"rows": [messages.Row("nonce/2", (1 << 63) + 1, 3, "running")]},
        {"rows": [messages.Row("nonce/2", 10, -3, "running")]},
    ],
)
def test_impossible_telemetry_is_refused(wrong: dict[str, object]) -> None:
    body = rpc.encode(msgspec.structs.replace(EVENTS[1], **wrong))
    with pytest.raises(msgspec.ValidationError):
        rpc.decode_event(body)


@pytest.mark.parametrize("deadline_s", [-1.0, float("nan"), float("inf"), "soon"])
def test_an_impossible_deadline_is_refused(deadline_s: object) -> None:
    body = msgspec.msgpack.encode({"type": "drain", "draining": True, "deadline_s": deadline_s})
    with pytest.raises(msgspec.ValidationError):
        rpc.decode_command(body)


def test_an_impossible_prediction_does_not_cost_the_telemetry() -> None:
    row = messages.Row("nonce/2", 10, 3, "running", (float("nan"), -1.0, float("inf")))
    load = rpc.decode_event(rpc.encode(msgspec.structs.replace(EVENTS[1], rows=[row])))
    assert isinstance(load, messages.Telemetry)
    assert load.rows[0].resident == 10


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"nonsense",
        msgspec.msgpack.encode({"type": "run", "code": "x"}),
        msgspec.msgpack.encode({"type": "cut", "call": "seven", "key": "x"}),
        msgspec.msgpack.encode({"type": "cut", "call": 7}),
        msgspec.msgpack.encode(["cut", 7, "x"]),
        rpc.encode(messages.Cut(7, "x"))[:-1],
        rpc.encode(messages.Cut(7, "x")) + b"\x00",
    ],
)
def test_malformed_messages_are_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        rpc.decode_command(body)
    with pytest.raises(msgspec.DecodeError):
        rpc.decode_event(body)


def test_unknown_fields_of_a_newer_version_are_skipped() -> None:
    """Fields that this side does not know are skipped, so that instances and gateways can be updated one by one."""
    body = msgspec.msgpack.encode({"type": "cut", "call": 7, "key": "x", "deadline_s": 1.0})
    assert rpc.decode_command(body) == messages.Cut(7, "x")


def test_missing_fields_of_an_older_version_have_defaults() -> None:
    """A gateway that has no name and sets no deadline, an instance that knows no leases."""
    body = msgspec.msgpack.encode({"type": "subscribe", "interval_s": 0.1})
    assert rpc.decode_command(body) == messages.Subscribe(0.1, gateway="")
    assert rpc.decode_command(msgspec.msgpack.encode({"type": "drain", "draining": True})) == messages.Drain(True)
    hello = msgspec.to_builtins(EVENTS[0])
    del hello["leases"]
    read = rpc.decode_event(msgspec.msgpack.encode(hello))
    assert isinstance(read, messages.Hello)
    assert not read.leases


@pytest.mark.parametrize("key", ["gateway/nonce/2", "gateway/nonce/2/copy-1", "gateway/", "gateway"])
def test_a_key_names_its_gateway(key: str) -> None:
    assert messages.owner(key) == "gateway"


def test_telemetry_of_many_requests_fits_a_message() -> None:
    rows = [messages.Row(f"{number:08x}/{number:010x}/2", 32768, 4096, "running") for number in range(4096)]
    assert len(rpc.encode(messages.Telemetry(1, 1, 1, 1, 1, 0.1, 1, 1, rows))) < rpc.MAX_MESSAGE_BYTES / 10


def test_answers_do_not_share_their_defaults() -> None:
    first, second = messages.CutResult(1, "a", "unknown"), messages.CutResult(2, "b", "unknown")
    first.tail.append(1)
    assert second.tail == []
