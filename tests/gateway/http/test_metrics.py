"""What an operator's tools read: models, version, readiness, metrics."""

from ares import __version__
from tests.gateway.http.service import MODEL, Service


async def test_models_version_and_readiness(shared: Service) -> None:
    models = (await shared.client.get("/v1/models")).json()
    assert [(m["id"], m["max_model_len"]) for m in models["data"]] == [(MODEL, 4096)]
    version = (await shared.client.get("/version")).json()
    assert version["ares"] == __version__
    assert set(version["instances"]) == {"prefill-0", "decode-0", "decode-1"}
    assert (await shared.client.get("/ready")).json() == {"status": "ready"}


async def test_metrics_names(shared: Service) -> None:
    await shared.complete()
    text = (await shared.client.get("/metrics")).text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert {
        "ares_requests_total",
        "ares_active_requests",
        "ares_prompt_tokens_total",
        "ares_output_tokens_total",
        "ares_time_to_first_token_seconds",
        "ares_time_per_output_token_seconds",
        "ares_migrations_total",
        "ares_migration_stall_seconds",
        "ares_migration_pulled_tokens_total",
        "ares_unmovable_requests_total",
        "ares_rebalance_decisions_total",
        "ares_instance_up",
        "ares_instance_resident_tokens",
        "ares_instance_kv_usage_ratio",
        "ares_instance_step_time_seconds",
        "ares_instance_running_requests",
        "ares_instance_waiting_requests",
        "ares_instance_preemptions",
    } <= names
    assert 'ares_instance_up{instance="decode-0",role="decode"} 1.0' in text
