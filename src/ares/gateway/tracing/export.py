"""Spans of OpenTelemetry, sent to a collector by OTLP over HTTP; imported only where tracing is on."""

import asyncio
import logging
import threading
from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span as OpenTelemetrySpan
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as OpenTelemetryTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ares import __version__
from ares.gateway.tracing.span import NOTHING, Attribute, Attributes, Span, Tracer

# What the SDK calls a service that has no name.
_NAMELESS = "unknown_service"
# Of a header of W3C Trace Context that is read.
_LONGEST = 512
_PROPAGATOR = TraceContextTextMapPropagator()
# It warns of each client's `tracestate` that is none, a line a request.
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)


def _known(attributes: Attributes) -> dict[str, Attribute]:
    return {name: value for name, value in attributes.items() if value is not None}


class ExportedSpan(Span):
    """A span that is sent when it has ended, if the sampler (OTEL_TRACES_SAMPLER) has taken its trace."""

    __slots__ = ("_headers", "_span", "_tracer")

    def __init__(self, span: OpenTelemetrySpan, tracer: OpenTelemetryTracer) -> None:
        self._span = span
        self._tracer = tracer
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """Its `traceparent`, and the client's `tracestate`."""
        if self._headers is None:
            self._headers = {}
            _PROPAGATOR.inject(self._headers, set_span_in_context(self._span))
        return self._headers

    def child(self, name: str, attributes: Attributes = NOTHING, *, calls: bool = False) -> "ExportedSpan":
        """Begin a span below this one."""
        kind = SpanKind.CLIENT if calls else SpanKind.INTERNAL
        span = self._tracer.start_span(name, set_span_in_context(self._span), kind, _known(attributes))
        return ExportedSpan(span, self._tracer)

    def event(self, name: str, attributes: Attributes = NOTHING) -> None:
        """Add an event."""
        if self._span.is_recording():
            self._span.add_event(name, _known(attributes))

    def set(self, attributes: Attributes) -> None:
        """Set attributes."""
        if self._span.is_recording():
            self._span.set_attributes(_known(attributes))

    def end(self, failure: BaseException | None = None) -> None:
        """End it, once; a cancellation is no error of the service: its client has left."""
        if not self._span.is_recording():  # it has ended, or is not sampled
            return
        if failure is not None and not isinstance(failure, asyncio.CancelledError):
            self._span.set_attribute("error.type", type(failure).__name__)
            self._span.set_status(Status(StatusCode.ERROR, str(failure)))
        self._span.end()


class ExportingTracer(Tracer):
    """Sends spans in the background, in batches (OTEL_BSP_*); what a slow collector leaves is dropped and logged.

    Parameters
    ----------
    endpoint
        URL of the collector's route; None: what OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_EXPORTER_OTLP_ENDPOINT says.
    name
        Name of this gateway: `service.instance.id`.
    flush_s
        Longest time to send what is left in `close`.

    Raises
    ------
    ValueError
        A variable of OpenTelemetry (OTEL_*) is wrong.
    """

    def __init__(self, endpoint: str | None, name: str, flush_s: float) -> None:
        resource = Resource.create({SERVICE_INSTANCE_ID: name})
        if str(resource.attributes[SERVICE_NAME]).startswith(_NAMELESS):
            resource = resource.merge(Resource({SERVICE_NAME: "ares-gateway", SERVICE_VERSION: __version__}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("ares.gateway", __version__)
        self._flush_s = flush_s

    def begin(self, name: str, headers: Mapping[str, str], attributes: Attributes = NOTHING) -> ExportedSpan:
        """Begin a span of the kind SERVER, below the client's if its `traceparent` is one."""
        sound = {name: value for name in _PROPAGATOR.fields if len(value := headers.get(name, "")) <= _LONGEST}
        context = _PROPAGATOR.extract(sound)
        span = self._tracer.start_span(name, context, SpanKind.SERVER, _known(attributes))
        return ExportedSpan(span, self._tracer)

    async def close(self) -> None:
        """Send what is left; a collector that does not answer holds up nobody."""
        # Not in the loop's executor, whose threads the interpreter waits for.
        ending = threading.Thread(target=self.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, self._flush_s)

    def shutdown(self) -> None:
        """Send what is left, and end."""
        self._provider.shutdown()
