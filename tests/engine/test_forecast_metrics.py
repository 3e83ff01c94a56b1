"""What routers of others read from an instance: its forecast."""

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from ares.engine.forecast_metrics import ForecastCollector
from ares.protocol import messages
from tests.engine.control_channel import HELLO  # 100 blocks of 16 tokens


def load(*rows: tuple[int, float | None]) -> messages.Telemetry:
    made = [
        messages.Row(f"k{n}", resident, 0, "running", None if left is None else (0.0, left, 2 * left))
        for n, (resident, left) in enumerate(rows)
    ]
    return messages.Telemetry(1, 0, len(rows), 0, 0, 0.0, 0, 0, made)


def shown(hello: messages.Hello | None, telemetry: messages.Telemetry | None) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(ForecastCollector(lambda: (hello, telemetry)))
    lines = generate_latest(registry).decode().splitlines()
    pairs = (line.split(" ") for line in lines if not line.startswith("#"))
    return {name.removeprefix("ares:"): float(value) for name, value in pairs}


def test_the_forecast_of_running_requests() -> None:
    assert shown(HELLO, load((800, 200.0), (400, 1000.0))) == {
        "kv_capacity_tokens": 1600,
        "predicted_peak_tokens": 1600,  # both after 200 steps
        "predicted_peak_kv_usage_ratio": 1.0,
        "predicted_remaining_tokens": 1200,
        "draining": 0,
    }


def test_without_a_predictor_what_is_held_now_counts() -> None:
    found = shown(HELLO, load((100, None), (60, None)))
    assert found["predicted_peak_kv_usage_ratio"] == 0.1
    assert "predicted_remaining_tokens" not in found


def test_an_idle_instance_has_every_gauge() -> None:
    found = shown(HELLO, msgspec.structs.replace(load(), draining=True))
    assert found["predicted_peak_kv_usage_ratio"] == found["predicted_remaining_tokens"] == 0
    assert found["draining"] == 1


def test_before_the_first_report_there_is_nothing() -> None:
    assert shown(None, None) == shown(HELLO, None) == shown(None, load()) == {}
