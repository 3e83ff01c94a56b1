"""Traces of requests, as OpenTelemetry has them (docs/tracing.md); off unless a collector is named."""
