"""The two generation routes: chat and text completions, streamed or whole."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message

from ares.gateway.control.backlog import BacklogReservation
from ares.gateway.http import schema
from ares.gateway.http.access import take_streams
from ares.gateway.http.responses import EventStream, Write, cleanup, error_body, until_disconnect
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.replies import DONE, Choice, Envelope, event, usage
from ares.gateway.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from ares.gateway.openai.sampling import Sampling
from ares.gateway.openai.text import Detokenizer
from ares.gateway.pool.generate import Delta, EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.service import Gateway
from ares.gateway.session.objectives import Objective
from ares.gateway.shutdown import ShuttingDownError
from ares.protocol.fields import CLASS_HEADER, REQUEST_ID_HEADER

logger = logging.getLogger(__name__)
router = APIRouter()

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
# Larger bodies are tokenised in a thread: other streams must not wait for it.
_LONG_BODY_BYTES = 20_000


@dataclass(slots=True)
class _Sequence:
    """What one session generates for one choice of a reply."""

    name: str
    prompt: list[int]
    sampling: Sampling
    choice: Choice
    echo: str


@dataclass(slots=True)
class _AcceptedRequest:
    """A request that has been checked and tokenised, with one sequence for each choice."""

    gateway: Gateway
    route: str
    request_id: str
    envelope: Envelope
    sequences: list[_Sequence]
    reservation: BacklogReservation
    objective: Objective
    arrived: float

    def usage(self) -> dict[str, int]:
        """Return the usage; a prompt counts once however many choices it has."""
        prompts = {id(sequence.prompt): len(sequence.prompt) for sequence in self.sequences}
        return usage(sum(prompts.values()), sum(sequence.choice.completion_tokens for sequence in self.sequences))

    async def generate(
        self, sequence: _Sequence, on_tokens: Callable[[_Sequence, list[Delta]], Awaitable[None]]
    ) -> None:
        """Generate one sequence, and measure it."""
        metrics, recent = self.gateway.metrics, self.gateway.recent
        first = 0.0

        async def emit(batch: list[Delta]) -> bool:
            nonlocal first
            if not first:
                first = time.monotonic()
                metrics.ttft.observe(first - self.arrived)
                recent.ttft_s.add(first - self.arrived)
            await on_tokens(sequence, batch)
            return sequence.choice.finish_reason is not None

        metrics.prompt_tokens.inc(len(sequence.prompt))
        try:
            # Without an await before `generate`: the session counts at every moment, and once.
            self.reservation.use(len(sequence.prompt))
            await self.gateway.generate(sequence.name, sequence.prompt, sequence.sampling, emit, self.objective)
        finally:
            tokens = sequence.choice.completion_tokens
            metrics.output_tokens.inc(tokens)
        if tokens > 1:
            tpot = (time.monotonic() - first) / (tokens - 1)
            metrics.tpot.observe(tpot)
            recent.tpot_s.add(tpot)

    async def generate_all(self, on_tokens: Callable[[_Sequence, list[Delta]], Awaitable[None]]) -> None:
        """Generate all sequences concurrently; the first failure cancels the others."""
        if len(self.sequences) == 1:
            await self.generate(self.sequences[0], on_tokens)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for sequence in self.sequences:
                    group.create_task(self.generate(sequence, on_tokens))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    @property
    def path(self) -> str:
        """The route's template."""
        return "/v1/chat/completions" if self.route == "chat" else "/v1/completions"

    def count(self, outcome: str) -> None:
        """Count the request by how it ended."""
        self.gateway.metrics.requests.labels(self.route, outcome).inc()


@router.post("/v1/chat/completions", **schema.generation(schema.ChatCompletion))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Generate the next message of a chat."""
    return await _serve(body, request, chat=True)


@router.post("/v1/completions", **schema.generation(schema.TextCompletion))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Generate a continuation of a prompt."""
    return await _serve(body, request, chat=False)


async def _serve(body: GenerationRequest, request: Request, *, chat: bool) -> Response:
    """Answer a request of either route: check and tokenise it, then generate, streamed or as a whole."""
    gateway: Gateway = request.app.state.gateway
    accepted = await _accept(gateway, body, request, chat=chat)
    headers = {REQUEST_ID_HEADER: accepted.request_id}
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage

        async def produce(write: Write) -> None:
            await _stream(accepted, write, with_usage=with_usage)

        return EventStream(produce, headers)
    return await _whole(accepted, request, headers)


async def _accept(gateway: Gateway, body: GenerationRequest, request: Request, *, chat: bool) -> _AcceptedRequest:
    """Check and tokenise a request; BadRequestError, NoInstanceError or ShuttingDownError where it is not accepted."""
    arrived = time.monotonic()
    gateway.shutdown.check()
    body.check_text()
    body.check_options()
    if body.model is not None and body.model not in gateway.names:
        raise BadRequestError(f"the model {body.model!r} is not served here", "model", "model_not_found", 404)
    gateway.check_queue()
    count = body.n * (len(body.prompts()) if isinstance(body, CompletionRequest) else 1)
    if count > gateway.config.maximum_waiting:
        message = f"prompts and n make {count} sequences; at most {gateway.config.maximum_waiting} may wait here"
        raise BadRequestError(message, "n")
    objective = gateway.objective(request.headers.get(CLASS_HEADER), body.priority)
    take_streams(request.scope, count)
    given = request.headers.get(REQUEST_ID_HEADER) or body.request_id or ""
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    envelope = Envelope(f"{'chatcmpl' if chat else 'cmpl'}-{request_id}", gateway.names[0], chat)
    reservation = cleanup(request.scope).enter_context(BacklogReservation(gateway.backlog, count))
    # By the size of the whole body: a template may use any of it. The prompt's length is known only afterwards:
    # templates leave text out, normalisers shorten it, and one token may stand for any number of spaces.
    long = len(await request.body()) > _LONG_BODY_BYTES
    prompts = await asyncio.to_thread(_tokenise, gateway, body) if long else _tokenise(gateway, body)
    gateway.check_backlog_tokens()  # other requests have arrived meanwhile
    reservation.add_tokens(sum(map(len, prompts)) * body.n)
    maximum = await _maximum_model_tokens(gateway, request)
    sequences: list[_Sequence] = []
    single = len(prompts) * body.n == 1
    limit = gateway.config.maximum_prompt_tokens
    for prompt in prompts:
        if limit is not None and len(prompt) > limit:
            message = f"the prompt has {len(prompt)} tokens; at most {limit} are taken here"
            raise BadRequestError(message, "messages" if chat else "prompt", "context_length_exceeded")
        base = body.sampling(len(prompt), maximum, gateway.sampling_defaults, gateway.pool.restored_by_all)
        echo = gateway.text.decode(prompt) if isinstance(body, CompletionRequest) and body.echo else ""
        for copy in range(body.n):
            index = len(sequences)
            sampling = base
            if base.parameters.get("seed") is not None and copy:
                # As in vLLM (v1/engine/parallel_sampling.py), each choice has a seed of its own.
                sampling = replace(base, parameters={**base.parameters, "seed": base.parameters["seed"] + copy})
            detokenizer = Detokenizer(
                gateway.text.tokenizer,
                prompt,
                stop=body.stop_strings(),
                include_stop=body.include_stop_str_in_output,
                skip_special=body.skip_special_tokens,
                minimum_tokens=body.min_tokens,
            )
            choice = Choice(
                envelope,
                index,
                detokenizer,
                gateway.text,
                logprobs=body.logprob_count(),
                token_ids=body.return_token_ids,
                tokens_as_ids=body.return_tokens_as_token_ids,
                counted_prompt=len(prompt) if body.usage_in_chunks() else None,
            )
            sequences.append(
                _Sequence(request_id if single else f"{request_id}-{index}", prompt, sampling, choice, echo)
            )
    return _AcceptedRequest(
        gateway, "chat" if chat else "completions", request_id, envelope, sequences, reservation, objective, arrived
    )


async def _maximum_model_tokens(gateway: Gateway, request: Request) -> int:
    """Return the longest session that the instances take, once there are any; 499 where the client leaves before."""
    while not gateway.serving or (maximum := gateway.maximum_model_tokens) is None:
        if not await until_disconnect(gateway.shutdown.run(gateway.wait_until_serving()), request.receive):
            raise HTTPException(499)  # the client has left
    return maximum


def _tokenise(gateway: Gateway, body: GenerationRequest) -> list[list[int]]:
    """Return the token ids of each prompt of a request; a chat has one."""
    if isinstance(body, ChatRequest):
        tools = body.tools if body.tool_choice != "none" else None
        ids = gateway.text.render_chat(
            body.messages, tools, special=body.add_special_tokens, variables=body.template_variables()
        )
        return [ids]
    assert isinstance(body, CompletionRequest)  # noqa: S101 - there are two kinds
    prompts = []
    size = gateway.text.tokenizer.get_vocab_size()
    for prompt in body.prompts():
        ids = gateway.text.encode(prompt, special=body.add_special_tokens) if isinstance(prompt, str) else prompt
        if not ids:
            raise BadRequestError("the prompt is empty", "prompt")
        if not all(0 <= token < size for token in ids):
            raise BadRequestError(f"token ids must lie between 0 and {size - 1}", "prompt")
        prompts.append(ids)
    return prompts


async def _stream(accepted: _AcceptedRequest, write: Write, *, with_usage: bool) -> None:
    """Generate a reply and write it as a stream of chunks; a failure is its last event."""

    async def on_tokens(sequence: _Sequence, batch: list[Delta]) -> None:
        await write(sequence.choice.stream(batch))

    outcome = "cancelled"
    try:
        await write(b"".join(sequence.choice.opening(sequence.echo) for sequence in accepted.sequences))
        await accepted.generate_all(on_tokens)
        outcome = "completed"
        ending = event(accepted.envelope.body([], chunk=True, usage=accepted.usage())) if with_usage else b""
        await write(ending + DONE)
    except Exception as failure:
        outcome = "failed"
        status, message, code = describe_failure(failure)
        accepted.gateway.metrics.refuse(accepted.path, status, code)
        await write(event(error_body(status, message, code=code)) + DONE)
    finally:
        accepted.count(outcome)


async def _whole(accepted: _AcceptedRequest, request: Request, headers: dict[str, str]) -> Response:
    """Generate a reply to its end, and return it as one body."""

    async def on_tokens(sequence: _Sequence, batch: list[Delta]) -> None:
        sequence.choice.collect(batch)

    async def receive() -> Message:
        return await request.receive()

    outcome = "cancelled"
    try:
        if not await until_disconnect(accepted.generate_all(on_tokens), receive):
            return Response(status_code=499)  # the client has left; it is not read
        outcome = "completed"
    except Exception:
        outcome = "failed"
        raise
    finally:
        accepted.count(outcome)
    choices: list[dict[str, Any]] = [sequence.choice.whole(sequence.echo) for sequence in accepted.sequences]
    return JSONResponse(accepted.envelope.body(choices, chunk=False, usage=accepted.usage()), headers=headers)


def describe_failure(failure: Exception) -> tuple[int, str, str | None]:
    """Return the HTTP status, the message and the error code, if it has one, of a generation that failed."""
    # An instance that refuses the gateway's own key is not the client's mistake.
    if isinstance(failure, EngineRefusedError) and failure.status < 500 and failure.status not in (401, 403):
        return failure.status, str(failure), None
    if isinstance(failure, NoInstanceError | ShuttingDownError):
        return 503, str(failure), failure.code
    if isinstance(failure, EngineLostError | EngineRefusedError):
        return 502, str(failure), None
    logger.error("unexpected failure", exc_info=failure)
    return 500, "the gateway failed; see its log", None
