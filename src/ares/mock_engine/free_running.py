"""A mock instance that computes nothing per token: it writes prepared events, so that only a gateway's cost shows.

`ares bench relay` measures before it. It shares HTTP, the token-level API and the descriptions with the other mock
engine, but has no steps: a stream gets a token at fixed intervals, or as many as its client reads. The OpenAI routes
are there for other routers. Run ``python -m ares.mock_engine.free_running``; it serves until it is terminated.
"""

import argparse
import asyncio
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import uvloop
from tokenizers import Tokenizer

from ares.engine.control import ControlChannel
from ares.engine.identity import control_address
from ares.mock_engine import api, report
from ares.mock_engine.http import Connection, HttpError, HttpRequest, decode, handler, server_sent_event
from ares.mock_engine.model import MockModel
from ares.mock_engine.pins import Pin
from ares.mock_engine.settings import EngineSettings, Identity
from ares.mock_engine.transfer import kv_transfer_params
from ares.protocol import messages
from ares.protocol.fields import RequestState
from ares.simulator.profile import Profile, StepTimeModel

# The output of every request, repeated; each of its tokens has its own text.
TEXT = " The quick brown fox jumps over the lazy dog while the sun sets slowly behind the old stone bridge."
_MAX_MODEL_LEN = 1 << 20
# Repetitions of the output in one write where the client alone sets the pace.
_REPETITIONS = 4
_PROFILE = Profile(
    name="free-running",
    model="none",
    source="takes no time",
    kv_tokens=1 << 24,
    kv_bytes_per_token=1,
    max_num_seqs=1 << 16,
    step=StepTimeModel(base_s=1e-9, per_request_s=0, per_resident_token_s=0, per_prefill_token_s=0),
)


class _Pace(msgspec.Struct):
    interval_s: Annotated[float, msgspec.Meta(ge=0, le=3600)]


class _Completion(msgspec.Struct):
    """What makes a difference in a request to the OpenAI routes."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool = False
    kv_transfer_params: dict[str, Any] | None = None


@dataclass(slots=True, eq=False)
class PreparedStream:
    """A streamed reply: an event for each of `count` tokens, with `events` repeated, then `last`.

    Attributes
    ----------
    key, prompt
        Key and prompt length of its request.
    interval
        Tokens of an event: so many of `events` are one, `chunks`; the first token has one of its own.
    chunks
        The events of `interval` tokens, by the token that they begin with.
    generated, written
        Tokens so far, and those that are written.
    sends_tokens
        Whether its tokens are sent over the control channel, too.
    """

    connection: Connection
    key: str
    prompt: int
    events: list[bytes]
    count: int
    last: bytes
    interval: int = 1
    chunks: Sequence[bytes] = ()
    sends_tokens: bool = False
    generated: int = 0
    written: int = 0
    batch: bytes = b""

    def __post_init__(self) -> None:
        self.batch = b"".join(self.events) * _REPETITIONS

    def take(self, limit: int) -> bytes:
        """Generate at most so many tokens, and at most those of one batch; return the events that are to be written."""
        size = len(self.events)
        count = min(limit, self.count - self.generated, size * _REPETITIONS)
        self.generated += count
        if self.interval == 1 and count == size * _REPETITIONS:
            self.written += count
            return self.batch
        return b"".join(self._events())

    def _events(self) -> Iterator[bytes]:
        size = len(self.events)
        while self.written < self.generated:
            chunk = 1 if self.written == 0 else self.interval
            if self.generated - self.written < chunk:
                return
            yield self.events[self.written % size] if chunk == 1 else self.chunks[self.written % size]
            self.written += chunk


class FreeRunningInstance:
    """The instance, and the service of its connections.

    Parameters
    ----------
    tokenizer
        Tokenizer of the model that the mock stands for.

    Attributes
    ----------
    interval_s
        Time between two tokens of a stream; 0: as fast as its client reads.
    """

    def __init__(self, identity: Identity, model: str, tokenizer: Tokenizer) -> None:
        self.identity = identity
        self.settings = EngineSettings(_PROFILE, model, _PROFILE.kv_tokens // _PROFILE.block_size, _MAX_MODEL_LEN)
        self.boot = uuid.uuid4().hex
        self.connections: set[Connection] = set()
        self.interval_s = 0.0
        ids = tuple(tokenizer.encode(TEXT, add_special_tokens=False).ids)
        self._model = MockModel(ids, ids[0], tokenizer.get_vocab_size())
        self._texts = [tokenizer.decode([token]) for token in ids]
        self._streams: dict[PreparedStream, None] = {}
        self._ticking = False
        self._control = ControlChannel(self.control_address, report.hello(self), self._telemetry)
        self._routes: dict[tuple[bytes, bytes], Callable[[HttpRequest, Connection], None]] = {
            (b"POST", b"/inference/v1/generate"): self._generate,
            (b"POST", b"/v1/chat/completions"): self._chat,
            (b"POST", b"/v1/completions"): self._complete,
            (b"POST", b"/simulate/pace"): self._set_pace,
            (b"GET", b"/health"): lambda _, connection: connection.reply({}),
            (b"GET", b"/version"): self._version,
            (b"GET", b"/v1/models"): lambda _, connection: connection.reply(report.models(self)),
            (b"GET", b"/ares/v1/instance"): lambda _, connection: connection.reply(report.description(self)),
        }

    @property
    def control_address(self) -> str:
        """Where gateways reach its control channel."""
        return control_address(self.identity.published_host, self.identity.control_port)

    @property
    def role(self) -> messages.Role:
        """Its role now."""
        return self._control.role

    @property
    def streams(self) -> int:
        """Number of streams that have not ended."""
        return len(self._streams)

    def close(self) -> None:
        """Close the control channel."""
        self._control.close()

    def _telemetry(self) -> messages.Telemetry:
        rows = [
            messages.Row(s.key, s.prompt + s.generated, s.generated, RequestState.RUNNING) for s in list(self._streams)
        ]
        used = sum(-(-row.resident // _PROFILE.block_size) for row in rows)
        return messages.Telemetry(0, used, len(rows), 0, 0, self.interval_s, 0, 0, rows)

    # --- what a connection asks of its service ---

    def answer(self, request: HttpRequest, connection: Connection) -> None:
        """Answer a request."""
        handler(self._routes, request)(request, connection)

    def caught_up(self, connection: Connection) -> None:
        """Continue a stream whose client reads again; a paced one continues by itself."""
        if not self.interval_s:
            self._write(connection.work)

    def disconnected(self, connection: Connection) -> None:
        """Drop the stream of a client that has disconnected."""
        self._streams.pop(connection.work, None)

    # --- streams ---

    def _begin(self, stream: PreparedStream, first: bytes = b"") -> None:
        stream.connection.work = stream
        stream.connection.begin()
        stream.connection.transport.write(first)
        self._streams[stream] = None
        if not self.interval_s:
            self._write(stream)
        elif not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_soon(self._tick, time.monotonic())

    def _write(self, stream: PreparedStream) -> None:
        """Write for as long as the client reads; other work of the loop goes between two writes."""
        if stream not in self._streams or stream.connection.paused:
            return
        self._write_events(stream, 1 << 30)
        asyncio.get_running_loop().call_soon(self._write, stream)

    def _write_events(self, stream: PreparedStream, limit: int) -> None:
        data = stream.take(limit)
        if stream.generated == stream.count:
            del self._streams[stream]
            stream.connection.end(data + stream.last)
        else:
            stream.connection.transport.write(data)

    def _tick(self, due: float) -> None:
        """Write one token of every stream, as a step of an engine does."""
        streams = list(self._streams)
        ids = self._model.ids
        self._control.post_tokens(
            messages.NewTokens(stream.key, stream.generated, [ids[stream.generated % len(ids)]])
            for stream in streams
            if stream.sends_tokens and stream.generated < stream.count
        )
        for stream in streams:
            self._write_events(stream, 1)
        due += self.interval_s
        self._ticking = bool(self._streams)
        if self._ticking:
            asyncio.get_running_loop().call_later(max(0.0, due - time.monotonic()), self._tick, due)

    # --- routes ---

    def _version(self, _: HttpRequest, connection: Connection) -> None:
        connection.reply({"version": report.engine_version(self), "mock": True})

    def _set_pace(self, request: HttpRequest, connection: Connection) -> None:
        self.interval_s = decode(request.body, _Pace).interval_s
        connection.reply({})

    def _generate(self, request: HttpRequest, connection: Connection) -> None:
        asked = api.read(request.body, self._model, _MAX_MODEL_LEN, connection)
        ids, count, interval = self._model.ids, asked.end, asked.interval
        if not asked.stream:
            asked.output += (ids[n % len(ids)] for n in range(count))
            transfer = self._transfer(asked.id, len(asked.prompt)) if asked.remote_decode else None
            connection.reply(api.whole(asked, self.settings.model, "length", None, transfer))
            return

        def tokens(begin: int, end: int) -> list[int]:
            return [ids[n % len(ids)] for n in range(begin, end)]

        events = [api.event(asked, [token]) for token in ids]
        chunks = [api.event(asked, tokens(n, n + interval)) for n in range(len(ids))] if interval > 1 else ()
        # Those that no whole event before it has.
        rest = 0 if count == 1 else 1 + (count - 2) // interval * interval
        last = api.last_event(asked, tokens(rest, count), "length", None)
        self._begin(
            PreparedStream(
                connection,
                asked.key or asked.id,
                len(asked.prompt),
                events,
                count - 1,
                last,
                interval,
                chunks,
                asked.sends_tokens,
            )
        )

    def _chat(self, request: HttpRequest, connection: Connection) -> None:
        self._answer_openai(decode(request.body, _Completion), connection, chat=True)

    def _complete(self, request: HttpRequest, connection: Connection) -> None:
        self._answer_openai(decode(request.body, _Completion), connection, chat=False)

    def _answer_openai(self, asked: _Completion, connection: Connection, *, chat: bool) -> None:
        key = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        count = asked.max_completion_tokens or asked.max_tokens or 16
        if count < 1:
            raise HttpError(400, f"max_tokens must be at least 1, got {count}", "max_tokens")
        common = {"id": key, "created": int(time.time()), "model": self.settings.model}
        texts = self._texts
        if not asked.stream:
            text = "".join(texts[n % len(texts)] for n in range(count))
            remote_decode = (asked.kv_transfer_params or {}).get("do_remote_decode") is True
            reply = {
                **common,
                "object": "chat.completion" if chat else "text_completion",
                "choices": [_choice({"message": {"content": text}} if chat else {"text": text}, "length")],
                "usage": {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": 1 + count},
                "kv_transfer_params": self._transfer(key, 1) if remote_decode else None,
            }
            connection.reply(reply)
            return
        common["object"] = "chat.completion.chunk" if chat else "text_completion"

        def event(text: str, finish: str | None = None) -> bytes:
            part = {"delta": {"content": text}} if chat else {"text": text}
            return server_sent_event({**common, "choices": [_choice(part, finish)]})

        role = _choice({"delta": {"role": "assistant", "content": ""}}, None)
        first = server_sent_event({**common, "choices": [role]}) if chat else b""
        last = event(texts[(count - 1) % len(texts)], "length") + api.DONE
        self._begin(PreparedStream(connection, key, 1, [event(text) for text in texts], count - 1, last), first)

    def _transfer(self, request_id: str, tokens: int) -> dict[str, Any]:
        pin = Pin(request_id, None, tokens, 0, -(-tokens // _PROFILE.block_size))
        return kv_transfer_params(self.identity, self.boot, pin)


def _choice(part: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **part, "logprobs": None, "finish_reason": finish, "stop_reason": None, "token_ids": None}


async def _serve(role: messages.Role, port: int, folder: Path, model: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        control_port = probe.getsockname()[1]
    identity = Identity(f"mock-{role}", role, "127.0.0.1", port, control_port)
    instance = FreeRunningInstance(identity, model, Tokenizer.from_file(str(folder / "tokenizer.json")))
    server = await asyncio.get_running_loop().create_server(lambda: Connection(instance), identity.host, port)
    await server.serve_forever()


def main() -> None:
    """Serve one free-running mock instance."""
    parser = argparse.ArgumentParser(description="A mock of a vLLM instance that computes nothing per token.")
    parser.add_argument("--role", choices=get_args(messages.Role), required=True)
    parser.add_argument("--port", type=int, required=True, help="HTTP port")
    parser.add_argument("--folder", type=Path, required=True, help="model folder: its tokenizer.json is read")
    parser.add_argument("--model", required=True, help="name in the replies")
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.role, arguments.port, arguments.folder, arguments.model))


if __name__ == "__main__":
    main()
