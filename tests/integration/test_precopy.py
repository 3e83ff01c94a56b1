"""Live pre-copy on real engines: the tokens are those of an unmoved request, and no pin outlives its purpose (I5)."""

import asyncio
import itertools
import random
from collections import Counter

import pytest
import zmq
import zmq.asyncio

from ares.protocol import messages, rpc
from tests.integration.client import Client
from tests.integration.tiny_model import VOCABULARY

BLOCK = 128
INSTANCES = ("decode-0", "decode-1")
_fresh = itertools.count(100)


def fresh_prompt(length: int) -> list[int]:
    """A prompt that no other test has used, so that nothing of it is cached anywhere."""
    generator = random.Random(next(_fresh))
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


async def pulled_by(client: Client, name: str) -> float:
    return await client.engine_metric(name, "vllm:external_prefix_cache_hits_total")


async def expired(client: Client) -> list[float]:
    return [await client.engine_metric(name, "vllm:nixl_num_kv_expired_reqs_total") for name in INSTANCES]


@pytest.mark.parametrize("length", [100, 127, 128, 129, 600, 2000])
async def test_full_blocks_go_ahead_and_the_hand_over_pulls_the_rest(client: Client, length: int) -> None:
    prompt = fresh_prompt(length)
    before = await expired(client)
    output, task = client.stream(f"ahead-{length}", prompt, 400)
    await output.reach(20)
    row = await client.row(f"ahead-{length}")
    assert row is not None
    target = INSTANCES[row["instance"] == INSTANCES[0]]
    pulled = await pulled_by(client, target)
    code, record = await client.migrate(f"ahead-{length}", target, "pre_copy")
    result = await task
    assert code == 200
    assert record["outcome"] == "moved", record
    assert record["mode"] == "pre_copy"
    # At least what was full when the move was ordered; never more than what was full when it was cut.
    assert record["precopied_tokens"] % BLOCK == 0
    assert record["precopied_tokens"] >= (length + 19) // BLOCK * BLOCK
    assert 0 < record["pulled_tokens"] < length + 400 - record["precopied_tokens"]
    assert await pulled_by(client, target) - pulled == record["precopied_tokens"] + record["pulled_tokens"]
    assert await expired(client) == before
    expected = (await client.complete(prompt, 400))["choices"][0]
    assert result.token_ids == expected["token_ids"]
    assert result.usage == {"prompt_tokens": length, "completion_tokens": 400, "total_tokens": length + 400}


@pytest.mark.gpu_defaults
async def test_concurrent_streams_copied_again_and_again_are_token_exact(client: Client) -> None:
    tokens = 120 if client.slow else 700
    prompts = [fresh_prompt(length) for length in (1, 126, 128, 300, 500, 900)]
    before = await expired(client)
    streams = [client.stream(f"again-{n}", prompt, tokens) for n, prompt in enumerate(prompts)]
    modes: Counter[tuple[str, str]] = Counter()

    async def keep_moving(name: str, task: "asyncio.Task[object]") -> None:
        for mode in itertools.cycle(("pre_copy", "pre_copy", "stop_and_copy")):
            if task.done():
                return
            record = await client.move_on(name, mode=mode)
            if record is not None:
                modes[record["mode"], record["outcome"]] += 1
            await asyncio.sleep(0.1)

    await asyncio.gather(*(keep_moving(f"again-{n}", task) for n, (_, task) in enumerate(streams)))
    outputs = [await task for _, task in streams]
    assert modes["pre_copy", "moved"] >= len(streams), modes
    assert await expired(client) == before
    expected = await asyncio.gather(*(client.complete(prompt, tokens) for prompt in prompts))
    for output, reply in zip(outputs, expected, strict=True):
        assert output.error is None
        assert output.token_ids == reply["choices"][0]["token_ids"], modes


@pytest.mark.gpu_defaults
async def test_a_request_that_ends_or_is_left_while_it_is_copied(client: Client) -> None:
    """`client` checks at the end of the test that no request, block or pin is left."""
    outcomes = set()
    for attempt in range(8 if client.slow else 16):
        name = f"ends-{attempt}"
        output, task = client.stream(name, fresh_prompt(1500), 24 + attempt % 4 if attempt % 2 else 2000)
        await output.reach(20)
        row = await client.row(name)
        if row is None or row["instance"] is None:
            await task
            continue
        move = asyncio.create_task(client.migrate(name, INSTANCES[row["instance"] == INSTANCES[0]], "pre_copy"))
        if attempt % 2 == 0:
            await asyncio.sleep(0.006 * attempt)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        code, record = await move
        assert code in (200, 404, 409), record
        outcomes.add(record.get("outcome", code))
    await client.quiet()
    assert outcomes & {"cancelled", "finished_first"}, outcomes
    assert outcomes <= {"moved", "cancelled", "finished_first", "not_running", 404, 409}


async def test_what_was_copied_and_evicted_is_pulled_again(client: Client) -> None:
    """The copy ahead is only cached: a target that needs the room takes it, and the hand-over brings everything."""
    prompt = fresh_prompt(1024)
    output, task = client.stream("evicted", prompt, 3000)
    await output.reach(5)
    row = await client.row("evicted")
    assert row is not None
    target = INSTANCES[row["instance"] == INSTANCES[0]]
    urls = {i["name"]: i["url"] for i in (await client.status())["instances"]}
    with await Control.open(client, urls[row["instance"]]) as source:
        key = await source.key_of(client, 1024)
        copied = await source.copy(key, "by-hand", 1024)
        assert copied.tokens == 1024
        body = {
            "request_id": "by-hand",
            "token_ids": [*prompt, output.token_ids[0]],
            "sampling_params": {"max_tokens": 1, "temperature": 0, "detokenize": False},
            "kv_transfer_params": {**copied.kv_transfer_params, "ares_key": "by-hand", "ares_ahead": True},
        }
        async with client.http.post(f"{urls[target]}/inference/v1/generate", json=body) as reply:
            assert reply.status == 200, await reply.text()
        # 128 blocks are all that the target has.
        fillers = [client.http.post(f"{urls[target]}/inference/v1/generate", json=filler(n)) for n in range(6)]
        for reply in await asyncio.gather(*fillers):
            assert reply.status == 200, await reply.text()
    code, record = await client.migrate("evicted", target, "stop_and_copy")
    assert code == 200
    assert record["pulled_tokens"] >= 1024, record
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def filler(number: int) -> dict[str, object]:
    return {
        "token_ids": [7 + number] * 3500,
        "sampling_params": {"max_tokens": 1, "temperature": 0, "detokenize": False},
    }


async def test_a_pin_that_nobody_pulls_is_freed_by_its_release_or_its_lease(client: Client) -> None:
    """What a gateway leaves behind that dies between the copy and the pull."""
    output, task = client.stream("pinned-copy", fresh_prompt(700), 3000)
    await output.reach(5)
    row = await client.row("pinned-copy")
    assert row is not None
    url = next(i["url"] for i in (await client.status())["instances"] if i["name"] == row["instance"])
    with await Control.open(client, url) as source:
        key = await source.key_of(client, 700)
        assert (await source.copy("nobody/1", "none", 700)).tokens == 0
        assert (await source.copy(key, "none", 100)).tokens == 0
        released = await source.copy(key, "released", 512)
        left = await source.copy(key, "left", 10_000)
        assert released.tokens == 512
        assert left.tokens >= 640
        assert await source.pinned() == 2
        await source.say(messages.Release("released"))
        await source.until_pinned(1, 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        # The request is gone and its blocks are held all the same, until the lease ends.
        assert await source.pinned() == 1
        assert (await source.telemetry()).kv_blocks_used == left.tokens // BLOCK
        await source.until_pinned(0, 60)
        assert (await source.telemetry()).kv_blocks_used == 0


class Control:
    """A second gateway's end of an instance's control channel."""

    def __init__(self, address: str) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._calls = itertools.count(1)

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @classmethod
    async def open(cls, client: Client, url: str) -> "Control":
        async with client.http.get(f"{url}/ares/v1/instance") as reply:
            control = cls((await reply.json())["control_address"])
        await control.say(messages.Subscribe(0.05))
        return control

    async def say(self, command: messages.Command) -> None:
        await self._socket.send(rpc.encode(command))

    async def hear(self, kind: type) -> object:
        async with asyncio.timeout(30):
            while True:
                event = rpc.decode_event(await self._socket.recv())
                if isinstance(event, kind):
                    return event

    async def telemetry(self) -> messages.Telemetry:
        # The second is certainly newer than the call; a subscription lasts 10 s.
        await self.say(messages.Subscribe(0.05))
        await self.hear(messages.Telemetry)
        event = await self.hear(messages.Telemetry)
        assert isinstance(event, messages.Telemetry)
        return event

    async def copy(self, key: str, pin: str, most: int) -> messages.CopyResult:
        await self.say(messages.Copy(next(self._calls), key, pin, most))
        event = await self.hear(messages.CopyResult)
        assert isinstance(event, messages.CopyResult)
        assert event.pin == pin
        return event

    async def key_of(self, client: Client, resident: int) -> str:
        rows = [row for row in (await self.telemetry()).rows if row.resident >= resident]
        assert len(rows) == 1, rows
        return rows[0].key

    async def pinned(self) -> int:
        return (await self.telemetry()).pinned

    async def until_pinned(self, count: int, patience_s: float) -> None:
        async with asyncio.timeout(patience_s):
            while await self.pinned() != count:
                pass
