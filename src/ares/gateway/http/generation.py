"""What all generation routes share: a request is checked, tokenised and generated, and streamed or sent as a whole."""

import asyncio
import logging
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message

from ares.gateway.control.backlog import BacklogReservation
from ares.gateway.http import request_span
from ares.gateway.http.access import take_streams
from ares.gateway.http.chosen import gateway_for
from ares.gateway.http.emitters import NewEmitter, StreamEmitter, WholeEmitter
from ares.gateway.http.responses import EventStream, Write, cleanup, error, until_disconnect, valid_request_id
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.parsing import OutputFormat, ParserFailedError
from ares.gateway.openai.replies import Choice, Envelope, Shown, usage
from ares.gateway.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from ares.gateway.openai.sampling import Sampling
from ares.gateway.openai.text import Detokenizer, TemplateError, Truncation, UnspacedDetokenizer
from ares.gateway.pool.delta import EngineLostError, EngineRefusedError
from ares.gateway.pool.instance import NoInstanceError
from ares.gateway.service import Gateway
from ares.gateway.session.objectives import Objective
from ares.gateway.shutdown import ShuttingDownError
from ares.gateway.tracing.span import NO_SPAN, Span
from ares.protocol.fields import CLASS_HEADER, REQUEST_ID_HEADER

logger = logging.getLogger(__name__)

# Larger bodies are tokenised in a thread: other streams must not wait for it.
_LONG_BODY_BYTES = 20_000
# Longer outputs that are sent as a whole are put together, and parsed, in a thread.
_LONG_OUTPUT_TOKENS = 1000

# Read only by a client that has closed no more than its own side of the connection.
_CLIENT_LEFT = "the client closed the connection, or its side of it, before the reply was made: keep it open until then"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt: its token ids, and its text where a reply shows it."""

    ids: list[int]
    text: str | None = None


@dataclass(slots=True)
class Sequence:
    """What one session generates for one choice of a reply."""

    name: str
    prompt: list[int]
    sampling: Sampling
    choice: Choice
    echo: str
    cached_tokens: int | None = None
    """Tokens of the prompt that were cached where it was prefilled; None where that is not known."""


@dataclass(slots=True)
class AcceptedRequest:
    """A request that has been checked and tokenised, with one sequence for each choice."""

    gateway: Gateway
    form: "ReplyForm"
    request_id: str
    envelope: Envelope
    sequences: list[Sequence]
    reservation: BacklogReservation
    objective: Objective
    arrived: float
    shown: dict[str, Any]
    span: Span

    def usage(self, *, with_cached: bool = False) -> dict[str, Any]:
        """Return the usage; a prompt counts once however many choices it has.

        It says how many tokens were cached with `with_cached`, or where the operator wants that everywhere.
        """
        prompts = {id(sequence.prompt): len(sequence.prompt) for sequence in self.sequences}
        choices = [sequence.choice for sequence in self.sequences]
        reasoning = [tokens for choice in choices if (tokens := choice.reasoning_tokens) is not None]
        completion = sum(choice.completion_tokens for choice in choices)
        counted = usage(sum(prompts.values()), completion, sum(reasoning) if reasoning else None)
        cached = self.sequences[-1].cached_tokens  # as in vLLM, of the last prompt
        if cached is not None and (with_cached or self.gateway.config.enable_prompt_tokens_details):
            counted["prompt_tokens_details"] = {"cached_tokens": cached}
        return counted

    async def generate(self, sequence: Sequence, new_emitter: NewEmitter) -> None:
        """Generate one sequence, and measure it."""
        metrics, recent = self.gateway.metrics, self.gateway.recent
        span = self.span

        def measure_first(at: float) -> None:
            metrics.ttft.observe(at - self.arrived)
            recent.ttft_s.add(at - self.arrived)
            span.set({"gen_ai.latency.time_to_first_token": at - self.arrived})

        emit = new_emitter(sequence.choice, measure_first)
        metrics.prompt_tokens.inc(len(sequence.prompt))
        try:
            # Without an await before `generate`: the session counts at every moment, and once.
            self.reservation.use(len(sequence.prompt))
            with request_span.of_sequence(self.span, sequence.name, len(self.sequences)) as span:
                sequence.cached_tokens = await self.gateway.generate(
                    sequence.name,
                    sequence.prompt,
                    sequence.sampling,
                    emit,
                    self.objective,
                    lambda: sequence.choice.reasoning_tokens,
                    span,
                )
        finally:
            tokens = sequence.choice.completion_tokens
            metrics.output_tokens.inc(tokens)
        if tokens > 1:
            tpot = (time.monotonic() - emit.first_at) / (tokens - 1)
            metrics.tpot.observe(tpot)
            recent.tpot_s.add(tpot)

    async def generate_all(self, new_emitter: NewEmitter) -> None:
        """Generate all sequences concurrently; the first failure cancels the others."""
        if len(self.sequences) == 1:
            await self.generate(self.sequences[0], new_emitter)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for sequence in self.sequences:
                    group.create_task(self.generate(sequence, new_emitter))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def end(self, outcome: str, failure: Exception | None = None) -> None:
        """Count the request by how it ended, and end its span."""
        self.gateway.metrics.requests.labels(self.form.label, outcome).inc()
        if self.span is not NO_SPAN:
            reasons = [sequence.choice.finish_reason for sequence in self.sequences]
            latency_s = time.monotonic() - self.arrived
            request_span.finish(self.span, outcome, failure, usage=self.usage(), reasons=reasons, latency_s=latency_s)


@dataclass(slots=True)
class NewChoice:
    """What a choice of a reply is made of, whatever its form.

    Attributes
    ----------
    options
        Keywords of `Choice`.
    sampling
        What was chosen for its session.
    output_format
        How its output is parsed; None where it is not.
    counts_reasoning
        Whether the tokens of its reasoning are counted apart.
    """

    envelope: Envelope
    index: int
    detokenizer: Detokenizer
    gateway: Gateway
    options: dict[str, Any]
    sampling: Sampling
    output_format: OutputFormat | None
    counts_reasoning: bool


class ReplyForm(ABC):
    """How a route writes the reply to one request.

    Attributes
    ----------
    label, path
        The route in metrics, and its template.
    id_prefix
        What the id of a reply begins with.
    """

    label: ClassVar[str]
    path: ClassVar[str]
    id_prefix: ClassVar[str]

    @abstractmethod
    def choice(self, new: NewChoice) -> Choice:
        """Make a choice, which takes the tokens of one session."""

    @abstractmethod
    def opening(self, accepted: AcceptedRequest) -> bytes:
        """Return what a stream begins with."""

    @abstractmethod
    def ending(self, accepted: AcceptedRequest) -> bytes:
        """Return what a stream ends with, once all choices are complete."""

    @abstractmethod
    def failure(self, status: int, message: str, code: str | None) -> bytes:
        """Return what a stream ends with where the generation failed, with the status that it would have had."""

    @abstractmethod
    def whole(self, accepted: AcceptedRequest) -> dict[str, Any]:
        """Return the body of a reply that is sent as a whole."""

    def headers(self, request_id: str) -> dict[str, str]:
        """Return the headers of a reply."""
        return {REQUEST_ID_HEADER: request_id}


async def serve(body: GenerationRequest, request: Request, form: ReplyForm) -> Response:
    """Answer a request: check and tokenise it, then generate, streamed or as a whole."""
    gateway = gateway_for(request, body.model)
    span = request_span.begin(gateway, body, request, form.path)
    cleanup(request.scope).callback(span.end)
    try:
        accepted = await _accept(gateway, body, request, form, span)
    except Exception as failure:
        request_span.refuse(span, failure)
        raise
    headers = form.headers(accepted.request_id)
    if body.stream:

        async def produce(write: Write) -> None:
            await _stream(accepted, write)

        return EventStream(produce, headers, keep_alive_s=gateway.config.sse_keep_alive_interval)
    return await _whole(accepted, request, headers)


async def _accept(
    gateway: Gateway, body: GenerationRequest, request: Request, form: ReplyForm, span: Span
) -> AcceptedRequest:
    """Check and tokenise a request; BadRequestError, NoInstanceError or ShuttingDownError where it is not accepted."""
    arrived = time.monotonic()
    gateway.shutdown.check()
    body.check_text()
    body.check_options()
    body.check_model(gateway.vocabulary, gateway.config.max_logprobs)
    if isinstance(body, ChatRequest):
        _check_chat(gateway, body)
    adapter = gateway.adapter(body.model)
    count = body.n * (len(body.prompts()) if isinstance(body, CompletionRequest) else 1)
    if count > gateway.config.maximum_waiting:
        message = f"prompts and n make {count} sequences; at most {gateway.config.maximum_waiting} may wait here"
        raise BadRequestError(message, "n")
    reservation = cleanup(request.scope).enter_context(gateway.reserve(count))
    objective = gateway.objective(request.headers.get(CLASS_HEADER), body.priority)
    take_streams(request.scope, count)
    given = request.headers.get(REQUEST_ID_HEADER) or body.request_id or ""
    request_id = given if valid_request_id(given) else uuid.uuid4().hex
    chat = isinstance(body, ChatRequest)
    envelope = Envelope(f"{form.id_prefix}{request_id}", adapter or gateway.names[0], chat)
    prompts = await tokenise(gateway, body, request)
    output_format = _output_format(gateway, body, prompts[0])
    prompt_tokens = sum(len(prompt.ids) for prompt in prompts) * body.n
    gateway.check_backlog_tokens(count, prompt_tokens)
    reservation.add_tokens(prompt_tokens)
    maximum = await _maximum_model_tokens(gateway, request)
    sequences: list[Sequence] = []
    single = len(prompts) * body.n == 1
    limit = gateway.config.maximum_prompt_tokens
    for prompt in prompts:
        if limit is not None and len(prompt.ids) > limit:
            message = f"the prompt has {len(prompt.ids)} tokens; at most {limit} are taken here"
            raise BadRequestError(message, body.prompt_field, "context_length_exceeded")
        restored, defaults = gateway.pool.restored_by_all, gateway.generation_defaults
        most_logprobs = gateway.config.max_logprobs
        sampled = body.sampling(len(prompt.ids), maximum, defaults, restored, output_format, most_logprobs)
        base = replace(sampled, adapter=adapter)
        echo = (prompt.text or "") if isinstance(body, CompletionRequest) and not body.return_token_ids else ""
        for copy in range(body.n):
            index = len(sequences)
            sampling = base
            if base.parameters.get("seed") is not None and copy:
                # As in vLLM (v1/engine/parallel_sampling.py), each choice has a seed of its own.
                sampling = replace(base, parameters={**base.parameters, "seed": base.parameters["seed"] + copy})
            choice = form.choice(_new_choice(gateway, body, envelope, index, prompt, sampling, output_format))
            sequences.append(
                Sequence(request_id if single else f"{request_id}-{index}", prompt.ids, sampling, choice, echo)
            )
    shown = _shown(gateway, body, prompts[0]).of_prompt() if chat else {}
    request_span.accept(
        span, request_id, adapter or gateway.names[0], [one.sampling for one in sequences], objective.name
    )
    return AcceptedRequest(gateway, form, request_id, envelope, sequences, reservation, objective, arrived, shown, span)


def _check_chat(gateway: Gateway, body: ChatRequest) -> None:
    """Refuse what needs a parser, or trust in clients' templates, that the gateway does not have."""
    parsers = gateway.parsers
    body.check_parsing(
        tools=parsers is not None and parsers.calls_tools,
        reasoning=parsers is not None and parsers.splits_reasoning,
    )
    if body.chat_template is not None and not gateway.config.trust_request_chat_template:
        message = "chat_template is not taken: the gateway runs without --trust-request-chat-template"
        raise BadRequestError(message, "chat_template")


def _new_choice(
    gateway: Gateway,
    body: GenerationRequest,
    envelope: Envelope,
    index: int,
    prompt: Prompt,
    sampling: Sampling,
    output_format: OutputFormat | None,
) -> NewChoice:
    """Return what one choice of a reply is made of."""
    text_options: dict[str, Any] = {
        "stop": body.stop_strings(),
        "include_stop": body.include_stop_str_in_output,
        "minimum_tokens": body.min_tokens,
        "texts": gateway.text.token_texts,
    }
    read = body if output_format is None else output_format
    if read.skip_special_tokens or read.spaces_between_special_tokens:
        skipped = read.skip_special_tokens
        detokenizer = Detokenizer(gateway.text.tokenizer, prompt.ids, skip_special=skipped, **text_options)
    else:
        detokenizer = UnspacedDetokenizer(gateway.text.tokenizer, prompt.ids, **text_options)
    config, as_ids = gateway.config, body.return_tokens_as_token_ids
    counted = body.usage_in_chunks(forced=config.enable_force_include_usage)
    options: dict[str, Any] = {
        "logprobs": body.logprob_count(),
        "token_ids": body.return_token_ids,
        "tokens_as_ids": config.return_tokens_as_token_ids if as_ids is None else as_ids,
        "counted_prompt": len(prompt.ids) if counted else None,
        "shown": _shown(gateway, body, prompt),
    }
    reasoning = gateway.parsers is not None and gateway.parsers.splits_reasoning
    return NewChoice(envelope, index, detokenizer, gateway, options, sampling, output_format, reasoning)


def _shown(gateway: Gateway, body: GenerationRequest, prompt: Prompt) -> Shown:
    """Return what a choice shows besides its text."""
    ids, interval = prompt.ids if body.return_token_ids else None, body.stream_interval or 1
    if isinstance(body, ChatRequest):
        role = gateway.config.response_role if body.add_generation_prompt else body.messages[-1].role
        return Shown(ids, prompt.text, role, interval)
    return Shown(ids, interval=interval, only_prompt=body.max_tokens == 0)


def _output_format(gateway: Gateway, body: GenerationRequest, prompt: Prompt) -> OutputFormat | None:
    """Return how the outputs of a request are parsed; None where they are not."""
    if gateway.parsers is None or not isinstance(body, ChatRequest):
        return None
    return gateway.parsers.output_format(body.given(), prompt.ids)


async def _truncation(gateway: Gateway, body: GenerationRequest, request: Request) -> Truncation | None:
    """Return how the prompts of a request are shortened; None where they are not."""
    tokens = body.truncate_prompt_tokens
    if tokens is None:
        return None
    longest = await _maximum_model_tokens(gateway, request)
    if tokens > longest:
        message = f"truncate_prompt_tokens={tokens} is too large: prompt and output have at most {longest} tokens"
        raise BadRequestError(message, "truncate_prompt_tokens")
    if tokens == -1:
        # One is left for the output, where it has a limit (vLLM's `max_truncation_tokens`).
        tokens = longest - 1 if body.limit() else longest
    return Truncation(tokens, body.truncation_side)


async def _maximum_model_tokens(gateway: Gateway, request: Request) -> int:
    """Return the longest session that the instances take, once there are any; 499 where the client leaves before."""
    while not gateway.serving or (maximum := gateway.maximum_model_tokens) is None:
        if not await until_disconnect(gateway.shutdown.run(gateway.wait_until_serving()), request.receive):
            raise HTTPException(499, _CLIENT_LEFT)
    return maximum


async def tokenise(gateway: Gateway, body: GenerationRequest, request: Request) -> list[Prompt]:
    """Return the prompts of a request; a chat has one."""
    # By the size of the whole body: a template may use any of it. The prompt's length is known only afterwards:
    # templates leave text out, normalisers shorten it, and one token may stand for any number of spaces.
    long = len(await request.body()) > _LONG_BODY_BYTES
    truncation = await _truncation(gateway, body, request)
    arguments = (gateway, body, truncation)
    try:
        return await asyncio.to_thread(render_prompts, *arguments) if long else render_prompts(*arguments)
    except TemplateError as error:
        raise BadRequestError(str(error), body.prompt_field) from error


def render_prompts(gateway: Gateway, body: GenerationRequest, truncation: Truncation | None = None) -> list[Prompt]:
    """Return the prompts of a request; TemplateError or BadRequestError where there is none."""
    if body.bad_words:
        gateway.text.bad_words(body.bad_words)
    if isinstance(body, ChatRequest):
        return [_render_chat(gateway, body, truncation)]
    assert isinstance(body, CompletionRequest)  # noqa: S101 - there are two kinds
    prompts = []
    for prompt in body.prompts():
        if isinstance(prompt, str):
            ids, shown = gateway.text.encode(prompt, special=body.add_special_tokens, truncation=truncation), prompt
        else:
            ids = _checked(gateway, prompt)
            shown = gateway.text.decode(ids) if body.echo else ""
            ids = ids if truncation is None else truncation.apply(ids)
        prompts.append(Prompt(_checked(gateway, ids), shown if body.echo else None))
    return prompts


def _render_chat(gateway: Gateway, body: ChatRequest, truncation: Truncation | None) -> Prompt:
    """Return the prompt of a chat."""
    tools = body.tools
    if body.tool_choice == "none" and gateway.config.exclude_tools_when_tool_choice_none:
        tools = None
    if gateway.parsers is not None:
        rendered = gateway.parsers.render(body.given(), tools=tools is not None)
        if rendered is not None:
            ids = rendered if truncation is None else truncation.apply(rendered)
            return Prompt(ids, gateway.text.decode(ids) if body.return_prompt_text else None)
    variables = body.template_variables()
    text = gateway.text.chat_text(body.messages, tools, variables=variables, template=body.chat_template)
    ids = gateway.text.encode(text, special=body.add_special_tokens, truncation=truncation)
    return Prompt(_checked(gateway, ids), text if body.return_prompt_text else None)


def _checked(gateway: Gateway, ids: list[int]) -> list[int]:
    """Return the ids of a prompt; BadRequestError where there are none, or one that the model does not have."""
    if not ids:
        raise BadRequestError("the prompt is empty", "prompt")
    # A model may have more rows than its tokenizer has tokens, and the other way round.
    size = max(gateway.text.tokenizer.get_vocab_size(), gateway.vocabulary or 0)
    if not (min(ids) >= 0 and max(ids) < size):
        raise BadRequestError(f"token ids must lie between 0 and {size - 1}", "prompt")
    return ids


async def _stream(accepted: AcceptedRequest, write: Write) -> None:
    """Generate a reply and write it as a stream of events; a failure is its last one."""
    form = accepted.form
    outcome, failed = "cancelled", None
    try:
        await write(form.opening(accepted))
        await accepted.generate_all(partial(StreamEmitter, write))
        outcome = "completed"
        await write(form.ending(accepted))
    except Exception as failure:
        outcome, failed = "failed", failure
        status, message, code = describe_failure(failure)
        accepted.gateway.metrics.refuse(form.path, status, code)
        await write(form.failure(status, message, code))
    finally:
        accepted.end(outcome, failed)


async def _whole(accepted: AcceptedRequest, request: Request, headers: dict[str, str]) -> Response:
    """Generate a reply to its end, and return it as one body."""

    async def receive() -> Message:
        return await request.receive()

    outcome, failed = "cancelled", None
    try:
        if not await until_disconnect(accepted.generate_all(WholeEmitter), receive):
            return error(499, _CLIENT_LEFT)
        long = any(sequence.choice.completion_tokens > _LONG_OUTPUT_TOKENS for sequence in accepted.sequences)
        body = await asyncio.to_thread(accepted.form.whole, accepted) if long else accepted.form.whole(accepted)
        outcome = "completed"
    except Exception as failure:
        outcome, failed = "failed", failure
        raise
    finally:
        accepted.end(outcome, failed)
    return JSONResponse(body, headers=headers)


def describe_failure(failure: Exception) -> tuple[int, str, str | None]:
    """Return the HTTP status, the message and the error code, if it has one, of a generation that failed."""
    # An instance that refuses the gateway's own key is not the client's mistake.
    if isinstance(failure, EngineRefusedError) and failure.status < 500 and failure.status not in (401, 403):
        return failure.status, str(failure), None
    if isinstance(failure, NoInstanceError | ShuttingDownError):
        return 503, str(failure), failure.code
    if isinstance(failure, EngineLostError | EngineRefusedError):
        return 502, str(failure), None
    if isinstance(failure, ParserFailedError):
        return 500, str(failure), failure.code
    logger.error("unexpected failure", exc_info=failure)
    return 500, "the gateway failed; see its log", None
