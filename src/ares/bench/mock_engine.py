"""A mock of a vLLM instance that computes nothing: what a gateway costs shows when the engine costs nothing.

It answers in the very form of vLLM 0.32, one event and one HTTP chunk a token, and says what it is in `/version` and
in its `Hello`. Run it with ``python -m ares.bench.mock_engine``; it serves until it is terminated.
"""

import argparse
import asyncio
import socket
import time
import uuid
from pathlib import Path
from typing import Any, get_args

import uvloop
from tokenizers import Tokenizer

from ares.bench.mock_http import END, STREAM_HEAD, Connection, Stream
from ares.bench.mock_http import event as encode_event
from ares.engine.control import ControlChannel
from ares.protocol import fields, messages

MOCK_VERSION = "mock (no model, ares.bench.mock_engine)"
# What every stream says over and over; each of its tokens has text of its own.
_TEXT = " The quick brown fox jumps over the lazy dog while the sun sets slowly behind the old stone bridge."
_MAXIMUM_TOKENS = 1 << 20
_BLOCK_TOKENS = 16
_KV_BLOCKS = 1 << 20


class MockEngine:
    """The state that the connections share.

    Parameters
    ----------
    role
        What the instance says it is for.
    tokenizer
        Tokenizer of the model that the mock stands for.
    model
        The name in its replies.
    control_address
        Where its control channel binds.
    """

    def __init__(self, role: messages.Role, tokenizer: Tokenizer, model: str, control_address: str) -> None:
        self.role = role
        self.model = model
        self.interval_s = 0.0
        self.control_address = control_address
        self.boot = uuid.uuid4().hex
        self.ids: list[int] = list(tokenizer.encode(_TEXT, add_special_tokens=False).ids)
        self.texts: list[str] = [tokenizer.decode([token]) for token in self.ids]
        self._streams: dict[Stream, Connection] = {}
        self._ticking = False
        peer = messages.Peer(f"mock-{role}", "127.0.0.1", 1)
        hello = messages.Hello(
            f"mock-{role}", role, self.boot, peer, _BLOCK_TOKENS, _KV_BLOCKS, _MAXIMUM_TOKENS, {"vllm": MOCK_VERSION}
        )
        self._control = ControlChannel(control_address, hello, self._telemetry)

    def _telemetry(self) -> messages.Telemetry:
        rows = [
            messages.Row(s.key, s.prompt + s.written, s.written, fields.RequestState.RUNNING)
            for s in list(self._streams)
        ]
        used = sum(-(-row.resident // _BLOCK_TOKENS) for row in rows)
        return messages.Telemetry(0, used, len(rows), 0, 0, self.interval_s, 0, 0, rows)

    def start(self, stream: Stream, connection: Connection) -> None:
        """Begin to write a stream."""
        self._streams[stream] = connection
        if not self.interval_s:
            self.write(stream)
        elif not self._ticking:
            self._ticking = True
            asyncio.get_running_loop().call_soon(self._tick, time.monotonic())

    def resume(self, stream: Stream) -> None:
        """Go on with a stream whose reader has caught up; a paced one goes on by itself."""
        if not self.interval_s:
            self.write(stream)

    def stop(self, stream: Stream) -> None:
        """Forget a stream whose reader has gone."""
        self._streams.pop(stream, None)

    def write(self, stream: Stream) -> None:
        """Write for as long as the reader takes it, leaving the loop to others between two writes."""
        connection = self._streams.get(stream)
        if connection is None or stream.paused:
            return
        self._write(stream, connection, 1 << 30)
        if stream in self._streams:
            asyncio.get_running_loop().call_soon(self.write, stream)

    def _write(self, stream: Stream, connection: Connection, limit: int) -> None:
        data, last = stream.take(limit)
        connection.transport.write(data)
        if last:
            del self._streams[stream]
            connection.stream = None

    def _tick(self, due: float) -> None:
        """Be one step of an engine: a token for every stream, all at once."""
        for stream, connection in list(self._streams.items()):
            self._write(stream, connection, 1)
        due += self.interval_s
        self._ticking = bool(self._streams)
        if self._ticking:
            asyncio.get_running_loop().call_later(max(0.0, due - time.monotonic()), self._tick, due)

    # --- replies ---

    def answer(self, path: bytes, body: dict[str, Any], connection: Connection) -> None:
        """Answer a request."""
        described = {
            "name": f"mock-{self.role}",
            "role": self.role,
            "boot": self.boot,
            "control_address": self.control_address,
            "models": [self.model],
        }
        match path.decode(errors="replace"):
            case fields.GENERATE_ROUTE:
                self.generate(body, connection)
            case "/v1/chat/completions" | "/v1/completions":
                self.complete(body, connection, chat=path == b"/v1/chat/completions")
            case "/mock/pace":
                self.interval_s = body["interval_s"]
                connection.reply({})
            case "/health":
                connection.reply({})
            case "/version":
                connection.reply({"version": MOCK_VERSION, "mock": True})
            case fields.MODELS_ROUTE:
                connection.reply({"object": "list", "data": [{"id": self.model, "object": "model"}]})
            case fields.INSTANCE_ROUTE:
                connection.reply(described)
            case _:
                connection.reply({"error": {"message": "a mock engine has no such route"}}, b"404 Not Found")

    def generate(self, body: dict[str, Any], connection: Connection) -> None:
        """Answer `POST /inference/v1/generate`."""
        key = body.get("request_id") or uuid.uuid4().hex
        prompt, count = len(body["token_ids"]), int(body["sampling_params"]["max_tokens"])

        def choice(tokens: list[int], finish: str | None) -> dict[str, Any]:
            return {
                "index": 0,
                "finish_reason": finish,
                "stop_reason": None,
                "token_ids": tokens,
                "routed_experts": None,
                "sampling_mask": None,
                "weight_versions": None,
                "logprobs": None,
            }

        def event(tokens: list[int], finish: str | None = None) -> bytes:
            choices = [choice(tokens, finish)]
            return encode_event({"request_id": key, "usage": None, "output_mode": "tokens", "choices": choices})

        if not body.get("stream"):
            tokens = [self.ids[n % len(self.ids)] for n in range(count)]
            reply = {
                "request_id": key,
                "model": self.model,
                "created": int(time.time()),
                "usage": _usage(prompt, count),
                fields.KV_TRANSFER_PARAMS: self._transfer(body, key),
                "output_mode": "tokens",
                "choices": [choice(tokens, "length")],
            }
            connection.reply(reply)
            return
        name = str((body.get(fields.KV_TRANSFER_PARAMS) or {}).get(fields.KEY, key))
        tail = event([self.ids[0]], "length") + END
        connection.begin(Stream(name, prompt, STREAM_HEAD, [event([i]) for i in self.ids], count - 1, tail))

    def complete(self, body: dict[str, Any], connection: Connection, *, chat: bool) -> None:
        """Answer `POST /v1/chat/completions` or `POST /v1/completions`."""
        key = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        count = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        created = int(time.time())

        def choice(text: str, finish: str | None, part: str = "delta") -> dict[str, Any]:
            said = {part: {"content": text}} if chat else {"text": text}
            more = {"stop_reason": None} if finish or not chat else {}
            return {"index": 0, **said, "logprobs": None, "finish_reason": finish, **more, "token_ids": None}

        def whole(choice: dict[str, Any], kind: str) -> dict[str, Any]:
            return {"id": key, "object": kind, "created": created, "model": self.model, "choices": [choice]}

        if not body.get("stream"):
            text = "".join(self.texts[n % len(self.texts)] for n in range(count))
            reply = whole(choice(text, "length", "message"), "chat.completion" if chat else "text_completion")
            connection.reply({**reply, "usage": _usage(1, count), fields.KV_TRANSFER_PARAMS: self._transfer(body, key)})
            return
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = STREAM_HEAD
        if chat:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            head += encode_event(whole(role, kind))
        events = [encode_event(whole(choice(text, None), kind)) for text in self.texts]
        tail = encode_event(whole(choice(self.texts[0], "length"), kind)) + END
        connection.begin(Stream(key, 1, head, events, count - 1, tail))

    def _transfer(self, body: dict[str, Any], key: str) -> dict[str, Any] | None:
        """Return what vLLM's NIXL connector tells whoever shall pull the KV."""
        if not (body.get(fields.KV_TRANSFER_PARAMS) or {}).get(fields.DO_REMOTE_DECODE):
            return None
        return {
            fields.DO_REMOTE_PREFILL: True,
            fields.DO_REMOTE_DECODE: False,
            fields.REMOTE_BLOCK_IDS: [[0]],
            fields.REMOTE_ENGINE_ID: f"mock-{self.role}",
            fields.REMOTE_REQUEST_ID: key,
            fields.REMOTE_HOST: "127.0.0.1",
            fields.REMOTE_PORT: 1,
            fields.TP_SIZE: 1,
        }


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _serve(role: messages.Role, port: int, folder: Path, model: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        control_address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = MockEngine(role, tokenizer, model, control_address)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Serve one mock instance."""
    parser = argparse.ArgumentParser(description="A mock of a vLLM instance.")
    parser.add_argument("--role", choices=get_args(messages.Role), required=True)
    parser.add_argument("--port", type=int, required=True, help="HTTP port")
    parser.add_argument("--folder", type=Path, required=True, help="model folder: its tokenizer.json is read")
    parser.add_argument("--model", required=True, help="name in the replies")
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.role, arguments.port, arguments.folder, arguments.model))


if __name__ == "__main__":
    main()
