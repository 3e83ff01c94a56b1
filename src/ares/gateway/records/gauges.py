"""Prometheus gauges of the instances."""

from collections.abc import Iterable

from ares.gateway.control.predictions import predicted_remaining
from ares.gateway.pool.instance import Instance
from ares.gateway.records.metrics import Metrics


def update(metrics: Metrics, instances: Iterable[Instance]) -> None:
    """Set the gauges of the instances; for one that is not up, only `ares_instance_up`."""
    loads = (
        metrics.instance_predicted,
        metrics.instance_resident,
        metrics.instance_kv,
        metrics.instance_step,
        metrics.instance_running,
        metrics.instance_waiting,
        metrics.instance_preemptions,
    )
    for gauge in (metrics.instance_up, *loads):
        gauge.clear()  # also those of instances whose name has changed
    for i in instances:
        metrics.instance_up.labels(i.name, i.role).set(i.health.healthy)
        load, hello = i.state.telemetry, i.state.hello
        if not i.health.healthy or load is None or hello is None:
            continue
        values = (
            predicted_remaining(load) if load.rows else 0,
            sum(row.resident for row in load.rows),
            load.kv_blocks_used / hello.kv_blocks,
            load.step_time_s,
            load.running,
            load.waiting,
            load.preemptions,
        )
        for gauge, value in zip(loads, values, strict=True):
            if value is not None:
                gauge.labels(i.name).set(value)
