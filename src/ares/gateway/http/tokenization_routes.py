"""`/tokenize` and `/detokenize` (vLLM 0.32, entrypoints/serve/tokenize)."""

from fastapi import APIRouter, Request

from ares.gateway.http import schema
from ares.gateway.http.chosen import gateway_for
from ares.gateway.http.generation import tokenise
from ares.gateway.openai.tokenization import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest

router = APIRouter(responses=schema.errors(400, 401, 404, 413))


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeReply:
    """Return the tokens of the prompt that a text, or a chat, becomes."""
    gateway = gateway_for(request, body.model)
    gateway.adapter(body.model)
    generation = body.generation_request()
    if body.prompt == "":  # which only a generation refuses
        ids = gateway.text.encode("", special=generation.add_special_tokens)
    else:
        ids = (await tokenise(gateway, generation, request))[0].ids
    names = [gateway.text.tokenizer.id_to_token(number) or "" for number in ids] if body.return_token_strs else None
    return TokenizeReply(count=len(ids), max_model_len=gateway.maximum_model_tokens, tokens=ids, token_strs=names)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeReply:
    """Return the text of tokens."""
    gateway = gateway_for(request, body.model)
    gateway.adapter(body.model)
    return DetokenizeReply(prompt=body.text(gateway.text))
