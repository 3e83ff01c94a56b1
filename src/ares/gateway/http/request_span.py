"""The span of a client's request: its attributes by OpenTelemetry's conventions for generative AI, as vLLM has them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.requests import CompletionRequest, GenerationRequest
from ares.gateway.openai.sampling import Sampling
from ares.gateway.service import Gateway
from ares.gateway.tracing.span import NO_SPAN, NO_TRACER, Span

_ID = "gen_ai.request.id"
# Of a model's name, which may be no model's; a span keeps it until the collector has taken it.
_LONGEST_NAME = 256


def begin(gateway: Gateway, body: GenerationRequest, request: Request, path: str) -> Span:
    """Begin the span of a request, in its client's trace."""
    if gateway.tracer is NO_TRACER:
        return NO_SPAN
    operation = "text_completion" if isinstance(body, CompletionRequest) else "chat"
    model = (body.model or gateway.names[0])[:_LONGEST_NAME]
    return gateway.tracer.begin(
        f"{operation} {model}",
        request.headers,
        {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model,
            "http.request.method": request.method,
            "http.route": path,
        },
    )


def refuse(span: Span, failure: Exception) -> None:
    """Note that a request was not accepted; for its client's own mistake that is no failure, as for spans of HTTP."""
    if isinstance(failure, BadRequestError):
        span.set({"http.response.status_code": failure.status, "ares.outcome": "refused"})
    else:
        span.end(failure)


def accept(span: Span, request_id: str, model: str, samplings: Sequence[Sampling], service_class: str) -> None:
    """Note what an accepted request asks for; `samplings` has one entry a sequence."""
    if span is NO_SPAN:
        return
    first = samplings[0]
    span.set(
        {
            _ID: request_id,
            "gen_ai.request.n": len(samplings),
            "gen_ai.request.max_tokens": first.maximum_tokens,
            "gen_ai.request.temperature": first.parameters.get("temperature"),
            "gen_ai.request.top_p": first.parameters.get("top_p"),
            "gen_ai.response.model": model,
            "ares.class": service_class,
            "ares.unmovable_reason": first.unmovable_reason,
        }
    )


def finish(
    span: Span,
    outcome: str,
    failure: Exception | None,
    *,
    usage: dict[str, Any],
    reasons: Sequence[str | None],
    latency_s: float,
) -> None:
    """End the span of an accepted request; `reasons` has one entry a sequence, None where it has not finished."""
    span.set(
        {
            "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
            "gen_ai.usage.completion_tokens": usage["completion_tokens"],
            "gen_ai.usage.num_sequences": len(reasons),
            "gen_ai.response.finish_reasons": [reason for reason in reasons if reason] or None,
            "gen_ai.latency.e2e": latency_s,
            "ares.outcome": outcome,
        }
    )
    span.end(failure)


@contextlib.contextmanager
def of_sequence(parent: Span, request_id: str, count: int) -> Iterator[Span]:
    """Give the span of one of so many sequences; of a single one it is that of the request, which ends later."""
    if count == 1:
        yield parent
        return
    with parent.child("sequence", {_ID: request_id}) as span:
        yield span
