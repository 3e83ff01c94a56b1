"""`/v1/chat/completions` and `/v1/completions`."""

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ares.gateway.http import schema
from ares.gateway.http.direct_route import DirectRoute
from ares.gateway.http.generation import AcceptedRequest, NewChoice, ReplyForm, serve
from ares.gateway.http.responses import error_body
from ares.gateway.openai.parsed_replies import ParsedChoice
from ares.gateway.openai.replies import DONE, Choice, event
from ares.gateway.openai.requests import ChatRequest, CompletionRequest, GenerationRequest

router = APIRouter(route_class=DirectRoute)


@router.post("/v1/chat/completions", **schema.generation(schema.ChatCompletion))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Generate the next message of a chat."""
    return await serve(body, request, ChatForm(body))


@router.post("/v1/completions", **schema.generation(schema.TextCompletion))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Generate a continuation of a prompt."""
    return await serve(body, request, CompletionForm(body))


class CompletionForm(ReplyForm):
    """OpenAI's text completions."""

    label: ClassVar[str] = "completions"
    path: ClassVar[str] = "/v1/completions"
    id_prefix: ClassVar[str] = "cmpl-"

    def __init__(self, body: GenerationRequest) -> None:
        self._body = body

    def choice(self, new: NewChoice) -> Choice:
        """Make a choice."""
        text, parsed = new.gateway.text, new.output_format
        if parsed is None:
            return Choice(new.envelope, new.index, new.detokenizer, text, **new.options)
        return ParsedChoice(
            new.envelope,
            new.index,
            new.detokenizer,
            text,
            parser=parsed.parser(),
            hides_reasoning=parsed.hides_reasoning,
            counts_reasoning=new.counts_reasoning,
            **new.options,
        )

    def opening(self, accepted: AcceptedRequest) -> bytes:
        """Return the first chunk of each choice."""
        return b"".join(sequence.choice.opening(sequence.echo) for sequence in accepted.sequences)

    def ending(self, accepted: AcceptedRequest) -> bytes:
        """Return the chunk with the usage, where it is asked for, and OpenAI's end of a stream."""
        if not self._body.with_usage(forced=accepted.gateway.config.enable_force_include_usage):
            return DONE
        return event(accepted.envelope.body([], chunk=True, usage=accepted.usage())) + DONE

    def failure(self, status: int, message: str, code: str | None) -> bytes:
        """Return an error in place of a chunk."""
        return event(error_body(status, message, code=code)) + DONE

    def whole(self, accepted: AcceptedRequest) -> dict[str, Any]:
        """Return all choices."""
        choices = [sequence.choice.whole(sequence.echo) for sequence in accepted.sequences]
        return accepted.envelope.body(choices, chunk=False, usage=accepted.usage(), **accepted.shown)


class ChatForm(CompletionForm):
    """OpenAI's chat completions."""

    label: ClassVar[str] = "chat"
    path: ClassVar[str] = "/v1/chat/completions"
    id_prefix: ClassVar[str] = "chatcmpl-"
