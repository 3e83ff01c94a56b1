"""Prometheus gauges of the instances and of learners' reports."""

from collections.abc import Iterable

from ares.gateway.pool.instance import Instance
from ares.gateway.records.metrics import Metrics
from ares.names import short_version
from ares.predicted_load import predicted_remaining
from ares.protocol.learner_report import Report


def update(metrics: Metrics, instances: Iterable[Instance], learners: Iterable[tuple[Report, float]]) -> None:
    """Set the gauges of the instances, and of learners by their reports and the ages of these in seconds.

    For an instance that is not up, only `ares_instance_up` is set.
    """
    _update_instances(metrics, instances)
    for gauge in (
        metrics.predictor_info,
        metrics.predictor_loss,
        metrics.predictor_recorded,
        metrics.predictor_age,
    ):
        gauge.clear()
    for report, age_s in learners:
        _update_learner(metrics, report, age_s)


def _update_learner(metrics: Metrics, report: Report, age_s: float) -> None:
    name = report.learner
    metrics.predictor_age.labels(name).set(age_s)
    metrics.predictor_recorded.labels(name).set(report.outputs.recorded)
    for model, predictor in (("champion", report.champion), ("challenger", report.challenger)):
        if predictor is not None:
            version = short_version(predictor.version)
            metrics.predictor_info.labels(name, model, version, predictor.kind).set(1)
    for position, losses in report.newest_losses.items():
        values = {"curve": losses.curve, "champion": losses.champion, "challenger": losses.challenger}
        for model, loss in values.items():
            if loss is not None:
                metrics.predictor_loss.labels(name, model, position).set(loss)


def _update_instances(metrics: Metrics, instances: Iterable[Instance]) -> None:
    loads = (
        metrics.instance_predicted,
        metrics.instance_resident,
        metrics.instance_kv,
        metrics.instance_step,
        metrics.instance_running,
        metrics.instance_waiting,
        metrics.instance_preemptions,
    )
    for gauge in (metrics.instance_up, metrics.instance_predictor, *loads):
        gauge.clear()  # also those of instances whose name has changed
    for i in instances:
        metrics.instance_up.labels(i.name, i.role).set(i.health.healthy)
        load, hello = i.state.telemetry, i.state.hello
        if not i.health.healthy or load is None or hello is None:
            continue
        metrics.instance_predictor.labels(i.name, short_version(load.predictor)).set(1)
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
