"""Routes of OpenAI's, Anthropic's and vLLM's APIs that are not offered: refused by name, not as unknown ones."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request
from starlette.responses import Response

from ares.gateway.http.responses import error

CODE = "not_offered"
_GENERATION = "this gateway serves generation alone: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages"
_TOKENS = "/tokenize and /detokenize are offered"
_INSTANCES = "it is a route of the instances, which serve one gateway or several"
# What they are for, and what to do instead.
_ROUTES: dict[str, tuple[tuple[str, ...], str]] = {
    "embeddings, rankings and classes": (
        ("/v1/embeddings", "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/pooling", "/classify"),
        _GENERATION,
    ),
    "audio, images and video": (("/v1/audio", "/v1/images", "/v1/videos", "/v1/realtime"), _GENERATION),
    "moderation": (("/v1/moderations",), _GENERATION),
    "batches": (("/v1/batches", "/v1/messages/batches"), f"send the requests themselves; {_GENERATION}"),
    "stored files and vectors": (("/v1/files", "/v1/uploads", "/v1/vector_stores", "/v1/containers"), _GENERATION),
    "assistants and stored conversations": (
        ("/v1/assistants", "/v1/threads", "/v1/conversations"),
        f"send the whole conversation; {_GENERATION}",
    ),
    "training and its evaluation": (("/v1/fine_tuning", "/v1/evals"), _GENERATION),
    "text before text (the completions of OpenAI's first years)": (("/v1/edits", "/v1/complete"), _GENERATION),
    "the tokenizer's configuration": (("/tokenizer_info",), _TOKENS),
    "an instance": (
        ("/inference/v1/generate", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/invocations"),
        _INSTANCES,
    ),
}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def _refusing(purpose: str, instead: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        path = request.scope["path"][:100]
        return error(404, f"{path} is not offered ({purpose}): {instead}", code=CODE)

    return refuse


def _router() -> APIRouter:
    made = APIRouter(include_in_schema=False)
    for purpose, (paths, instead) in _ROUTES.items():
        for path in paths:
            for under in (path, path + "/{rest:path}"):
                made.add_api_route(under, _refusing(purpose, instead), methods=_METHODS, response_model=None)
    return made


router = _router()
