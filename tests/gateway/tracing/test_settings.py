"""Whether a gateway traces: by its setting, or by OpenTelemetry's own variables."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from ares import extras
from ares.config import ConfigError, GatewayConfig
from ares.gateway.tracing import settings
from ares.gateway.tracing.export import ExportingTracer
from ares.gateway.tracing.span import NO_TRACER
from tests.gateway.tracing.collector import collecting

URL = "http://127.0.0.1:1/v1/traces"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def test_off_by_default_and_nothing_of_it_is_imported() -> None:
    assert settings.make_tracer(None, "gateway") is NO_TRACER
    code = "import sys, ares.gateway.serving; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("variable", [ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
async def test_on_by_a_variable_of_opentelemetry(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "tenant=me")
    with collecting() as collector:
        monkeypatch.setenv(variable, collector.url + ("/v1/traces" if "TRACES" in variable else ""))
        tracer = settings.make_tracer(None, "gateway-1")
        tracer.begin("chat", {}).end()
        await tracer.close()
        assert collector.one("chat").kind == "server"
        assert (collector.resource["service.name"], collector.headers["tenant"]) == ("mine", "me")


@pytest.mark.parametrize("off", [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_what_turns_opentelemetry_off(off: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, URL)
    monkeypatch.setenv(*off)
    assert settings.make_tracer(None, "gateway") is NO_TRACER
    with pytest.raises(ConfigError, match=f"{off[0]}={off[1]} turns off what --otlp-traces-endpoint turns on"):
        settings.check(URL)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "grpc: spans are sent by http/protobuf only"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1000000", "max_export_batch_size"),
    ],
)
def test_variables_that_cannot_be_used(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=said):
        settings.check(URL)
    # Where they may be meant for other programs, the gateway serves all the same.
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING):
        assert settings.make_tracer(None, "gateway") is NO_TRACER
    assert "requests are not traced" in caplog.text


@pytest.mark.parametrize("variable", [ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_a_variable_that_names_no_collector(
    variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "collector:4318")
    assert settings.make_tracer(None, "gateway") is NO_TRACER
    assert f"requests are not traced: {variable}: 'collector:4318' is no collector" in caplog.text
    settings.check(URL)  # which the setting replaces


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_SAMPLER", "nonsense"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a b c"),
        ("OTEL_RESOURCE_ATTRIBUTES", ",=,x"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
    ],
)
def test_variables_that_opentelemetry_itself_replaces_by_its_defaults(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    settings.check(URL)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delitem(sys.modules, "ares.gateway.tracing.export")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(extras.MissingPackageError, match=r"opentelemetry is missing: .*\.\[otel\]"):
        settings.check(URL)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    assert settings.make_tracer(None, "gateway") is NO_TRACER
    assert "requests are not traced: opentelemetry is missing" in caplog.text


def test_a_collector_by_its_host_alone_gets_the_path_of_otlp(tmp_path: Path) -> None:
    def given(url: str) -> str | None:
        return GatewayConfig(model="m", workers=["http://127.0.0.1:1"], otlp_traces_endpoint=url).otlp_traces_endpoint

    assert given(" http://collector:4318 ") == given("http://collector:4318/") == "http://collector:4318/v1/traces"
    assert given("https://collector/api/otlp/v1/traces?a=b") == "https://collector/api/otlp/v1/traces?a=b"
    for wrong in ("", "collector:4317", "grpc://collector:4317", "http://", "http://[", "http://a b", "http://a:x/"):
        with pytest.raises(ValueError, match="no collector that takes OTLP over HTTP"):
            given(wrong)


async def test_nothing_is_left_of_a_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = settings.make_tracer(URL, "gateway")
    assert isinstance(tracer, ExportingTracer)
    await tracer.close()
    span = tracer.begin("chat", {})  # of a request that outlives it
    span.child("decode").end()
    span.end()
