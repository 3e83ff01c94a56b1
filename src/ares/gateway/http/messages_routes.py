"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's API."""

from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from ares.gateway.anthropic.errors import MESSAGES_ROUTE, error_body
from ares.gateway.anthropic.reply import MessageWriter, usage
from ares.gateway.anthropic.requests import CountTokensRequest, MessagesChat, MessagesRequest
from ares.gateway.anthropic.template import TemplateTraits, traits
from ares.gateway.http import schema
from ares.gateway.http.blocks_form import block_choice
from ares.gateway.http.chosen import gateway_for
from ares.gateway.http.generation import AcceptedRequest, NewChoice, ReplyForm, render_prompts, serve, tokenise
from ares.gateway.openai.block_choice import BlockChoice
from ares.gateway.service import Gateway
from ares.protocol.fields import REQUEST_ID_HEADER

router = APIRouter()


@router.post(MESSAGES_ROUTE, **schema.generation(schema.MessageReply, schema.AnthropicError, "`message_stop`"))
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Generate the next message of a conversation."""
    return await serve(_chat(body, request), request, MessagesForm())


@router.post(MESSAGES_ROUTE + "/count_tokens", responses=schema.errors(400, 401, 404, 413, model=schema.AnthropicError))
async def count_tokens(body: CountTokensRequest, request: Request) -> schema.TokenCount:
    """Count the tokens of the prompt that a conversation becomes."""
    gateway = gateway_for(request, body.model)
    chat = _chat(body, request)
    chat.check_options()
    gateway.adapter(chat.model)
    count = len((await tokenise(gateway, chat, request))[0].ids)
    return schema.TokenCount(input_tokens=count, context_management={"original_input_tokens": count})


def _chat(body: CountTokensRequest, request: Request) -> MessagesChat:
    """Return the chat request that generates the same."""
    gateway = gateway_for(request, body.model)
    known: dict[Gateway, TemplateTraits] = request.app.state.template_traits
    found = known.get(gateway)
    if found is None:
        found = known[gateway] = traits(lambda chat: render_prompts(gateway, chat)[0].ids)
    converted = body.chat_body(system_first=found.system_first, disabled_thinking=found.disabled_thinking)
    return MessagesChat.of(converted)


class MessagesForm(ReplyForm):
    """Anthropic's messages."""

    label: ClassVar[str] = "messages"
    path: ClassVar[str] = MESSAGES_ROUTE
    id_prefix: ClassVar[str] = "msg_"

    def __init__(self) -> None:
        self._writer: MessageWriter
        self._choice: BlockChoice

    def choice(self, new: NewChoice) -> BlockChoice:
        """Make the choice."""
        self._writer = MessageWriter(new.envelope.id, new.envelope.model)
        self._choice = block_choice(new, self._writer)
        return self._choice

    def opening(self, accepted: AcceptedRequest) -> bytes:
        """Return the events before the first token."""
        self._writer.start(usage(accepted.usage()))
        return self._writer.take_events()

    def ending(self, accepted: AcceptedRequest) -> bytes:
        """Return the events that end the message."""
        self._complete(accepted)
        return self._writer.take_events()

    def failure(self, status: int, message: str, code: str | None) -> bytes:
        """Return the event of an error."""
        self._writer.fail(error_body(status, message))
        return self._writer.take_events()

    def whole(self, accepted: AcceptedRequest) -> dict[str, Any]:
        """Return the message."""
        self._choice.parse_whole()
        return self._complete(accepted)

    def headers(self, request_id: str) -> dict[str, str]:
        """Return the headers of a reply; Anthropic's clients read the id of the request from `request-id`."""
        return {REQUEST_ID_HEADER: request_id, "request-id": request_id}

    def _complete(self, accepted: AcceptedRequest) -> dict[str, Any]:
        choice = self._choice
        return self._writer.complete(choice.finish_reason, choice.stop_reason, usage(accepted.usage()))
