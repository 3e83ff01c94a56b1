"""Whether a gateway traces, and where its spans go: `--otlp-traces-endpoint`, or OpenTelemetry's own variables."""

import logging
import os
from collections.abc import Mapping

from ares import extras
from ares.config import ConfigError
from ares.gateway.tracing.span import NO_TRACER, Tracer
from ares.otlp import traces_url

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OFF = {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "none"}
_PROTOCOL = "http/protobuf"
# For the spans that are left when a gateway ends.
_FLUSH_S = 3.0


def check(endpoint: str | None) -> None:
    """Raise what `make_tracer` raises, before anything is served."""
    if endpoint is not None:
        make_tracer(endpoint, "check").shutdown()


def make_tracer(endpoint: str | None, name: str) -> Tracer:
    """Return what traces for a gateway of this name; NO_TRACER where tracing is off.

    It is on where an endpoint is given, or OpenTelemetry's variables name one; variables that cannot be used turn it
    off with a warning, since they may be there for other programs.

    Raises
    ------
    ConfigError, MissingPackageError
        `endpoint` is given, and a variable or a missing package stands against it.
    """
    if endpoint is None and not _wanted_by(os.environ):
        return NO_TRACER
    try:
        return _exporting(endpoint, name, os.environ)
    except (ConfigError, extras.MissingPackageError) as error:
        if endpoint is not None:
            raise
        logger.warning("requests are not traced: %s", error)
        return NO_TRACER


def _wanted_by(variables: Mapping[str, str]) -> bool:
    return any(variables.get(name) for name in _ENDPOINTS) and _disabled_by(variables) is None


def _disabled_by(variables: Mapping[str, str]) -> str | None:
    """Return what turns tracing off, as it is set."""
    for name, off in _OFF.items():
        if variables.get(name, "").strip().lower() == off:
            return f"{name}={off}"
    return None


def _check_endpoint(variables: Mapping[str, str]) -> None:
    """Raise ConfigError where the variable that names a collector names none."""
    name = next(name for name in _ENDPOINTS if variables.get(name))
    try:
        traces_url(variables[name])
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _exporting(endpoint: str | None, name: str, variables: Mapping[str, str]) -> Tracer:
    if (disabled := _disabled_by(variables)) is not None:
        raise ConfigError(f"{disabled} turns off what --otlp-traces-endpoint turns on: leave one of them out")
    if endpoint is None:
        _check_endpoint(variables)
    for protocol in _PROTOCOLS:
        if variables.get(protocol, _PROTOCOL) not in ("", _PROTOCOL):
            raise ConfigError(f"{protocol}={variables[protocol]}: spans are sent by {_PROTOCOL} only")
    try:
        from ares.gateway.tracing.export import ExportingTracer

        return ExportingTracer(endpoint, name, _FLUSH_S)
    except ModuleNotFoundError as error:
        raise extras.explain(error) from error
    except (ValueError, OSError) as error:  # of a variable: a limit that is no number, a file that is not there
        raise ConfigError(f"a variable of OpenTelemetry (OTEL_*) is wrong: {error}") from error
