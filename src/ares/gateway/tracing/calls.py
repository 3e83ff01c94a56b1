"""The spans of what a session does: its calls to instances, which vLLM's own spans hang below, and its moves."""

from urllib.parse import urlsplit

from ares.gateway.pool.instance import Instance
from ares.gateway.session.handover import MigrationRecord
from ares.gateway.tracing.span import Span


def call_span(parent: Span, name: str, instance: Instance, key: str, tokens: int) -> Span:
    """Begin the span of a request to an instance, under `key`, with so many tokens to begin with.

    vLLM's span has that key behind `generate-tokens-` (`gen_ai.request.id`).
    """
    parts = urlsplit(instance.url)
    return parent.child(
        name,
        {
            "server.address": parts.hostname,
            "server.port": parts.port,
            "gen_ai.request.id": key,
            "ares.instance": instance.name,
            "ares.tokens": tokens,
        },
        calls=True,
    )


def describe_move(span: Span, record: MigrationRecord) -> None:
    """Note how a move went."""
    span.set(
        {
            "ares.outcome": record.outcome,
            "ares.mode": record.mode,
            "ares.stall_s": record.stall_s,
            "ares.pulled_tokens": record.pulled_tokens,
            "ares.precopied_tokens": record.precopied_tokens,
            "ares.cut_s": record.cut_s,
            "ares.accept_s": record.accept_s,
            "ares.queued_s": record.queued_s,
        }
    )
