"""`/v1/responses`: requests are answered and nothing is kept, so that no response can be asked for again."""

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ares.gateway.http import schema
from ares.gateway.http.blocks_form import block_choice
from ares.gateway.http.generation import AcceptedRequest, NewChoice, ReplyForm, serve
from ares.gateway.openai.block_choice import BlockChoice
from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.responses.reply import ResponseWriter, usage
from ares.gateway.openai.responses.requests import NOTHING_KEPT, ResponsesRequest

router = APIRouter()


@router.post("/v1/responses", **schema.generation(schema.ResponseReply, last_event="`response.completed`"))
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Generate a response: a message, with reasoning and calls of functions where the model makes them."""
    return await serve(body.chat_request(), request, ResponsesForm(body))


@router.api_route("/v1/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
async def kept_response(rest: str) -> Response:
    """Refuse what would need a response that is kept."""
    raise BadRequestError(f"/v1/responses/{rest[:100]}: {NOTHING_KEPT}", "response_id", "response_not_found", 404)


class ResponsesForm(ReplyForm):
    """OpenAI's responses."""

    label: ClassVar[str] = "responses"
    path: ClassVar[str] = "/v1/responses"
    id_prefix: ClassVar[str] = "resp_"

    def __init__(self, body: ResponsesRequest) -> None:
        self._body = body
        self._writer: ResponseWriter
        self._choice: BlockChoice

    def choice(self, new: NewChoice) -> BlockChoice:
        """Make the choice."""
        envelope, sampling = new.envelope, new.sampling
        self._writer = ResponseWriter(
            self._body, envelope.id, envelope.model, sampling.parameters, sampling.maximum_tokens
        )
        self._choice = block_choice(new, self._writer)
        return self._choice

    def opening(self, accepted: AcceptedRequest) -> bytes:
        """Return the events before the first token."""
        self._writer.start()
        return self._writer.take_events()

    def ending(self, accepted: AcceptedRequest) -> bytes:
        """Return the events that end the response."""
        self._complete(accepted)
        return self._writer.take_events()

    def failure(self, status: int, message: str, code: str | None) -> bytes:
        """Return the event of a response that failed."""
        self._writer.fail(message, status)
        return self._writer.take_events()

    def whole(self, accepted: AcceptedRequest) -> dict[str, Any]:
        """Return the response."""
        self._choice.parse_whole()
        return self._complete(accepted)

    def _complete(self, accepted: AcceptedRequest) -> dict[str, Any]:
        cut = self._choice.finish_reason == "length"
        return self._writer.complete(usage(accepted.usage(with_cached=True)), cut=cut)
