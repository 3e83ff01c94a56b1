"""The gateway's Prometheus metrics. Labels are bounded.

They are presets, outcomes, reasons, names of instances and of a few learners, and versions of the predictor.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ares.gateway.http.refusals import reason

_TIME_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAP_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 900)
_TOKEN_BUCKETS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ares_requests_total", "Requests that ended, by outcome", ["route", "outcome"], registry=registry
        )
        self.refused = Counter(
            "ares_http_refused_total",
            "Requests answered with an error, or whose stream ended with one",
            ["route", "status", "reason"],
            registry=registry,
        )
        self.active = Gauge(
            "ares_active_requests", "Sequences that wait or run; a request has one for each choice", registry=registry
        )
        self.prompt_tokens = Counter(
            "ares_prompt_tokens_total", "Prompt tokens of accepted requests", registry=registry
        )
        self.output_tokens = Counter("ares_output_tokens_total", "Output tokens given to clients", registry=registry)
        self.step_tokens = Counter(
            "ares_output_step_tokens_total",
            "Output tokens that came over the step channel, ahead of their instance's reply",
            registry=registry,
        )
        self.part_tokens = Counter(
            "ares_output_part_tokens_total",
            "Tokens of complete outputs by part, reasoning or answer, where a reasoning parser is on",
            ["part"],
            registry=registry,
        )
        self.ttft = Histogram(
            "ares_time_to_first_token_seconds",
            "Time from arrival to the first token",
            registry=registry,
            buckets=_TIME_BUCKETS_S,
        )
        self.tpot = Histogram(
            "ares_time_per_output_token_seconds",
            "Time per output token after the first, per choice: (end - first token) / (output tokens - 1)",
            registry=registry,
            buckets=_TIME_BUCKETS_S,
        )
        self.longest_gap = Histogram(
            "ares_longest_gap_seconds",
            "Longest time between two tokens, per choice, by class of service",
            ["service_class"],
            registry=registry,
            buckets=_GAP_BUCKETS_S,
        )
        self.migrations = Counter(
            "ares_migrations_total",
            "Migrations that ended, by trigger and outcome",
            ["trigger", "outcome"],
            registry=registry,
        )
        self.stall = Histogram(
            "ares_migration_stall_seconds",
            "Pause of a migrated stream: from the last token of the source to the first of the target",
            registry=registry,
            buckets=_TIME_BUCKETS_S,
        )
        self.pulled = Counter(
            "ares_migration_pulled_tokens_total",
            "Tokens whose KV the targets of migrations pulled at the hand-over",
            registry=registry,
        )
        self.precopied = Counter(
            "ares_migration_precopied_tokens_total",
            "Tokens whose KV the targets of migrations pulled before the hand-over, while the request ran",
            registry=registry,
        )
        self.warm_copies = Counter(
            "ares_warm_copies_total",
            "Warm copies of running requests that were brought to another instance, or failed",
            ["outcome"],
            registry=registry,
        )
        self.warm_copied_tokens = Counter(
            "ares_warm_copied_tokens_total", "Tokens whose KV was pulled for warm copies", registry=registry
        )
        self.warm_copied_bytes = Counter(
            "ares_warm_copied_bytes_total", "Bytes of KV that were pulled for warm copies", registry=registry
        )
        self.resumptions = Counter(
            "ares_resumptions_total",
            "Requests that decode again after a loss or a suspension, by what has computed their tokens: the decode "
            "instance, with what it has cached, or prefill",
            ["where"],
            registry=registry,
        )
        self.resumed_cached_tokens = Counter(
            "ares_resumed_cached_tokens_total",
            "Tokens of resumed requests that were cached where they were resumed, and not computed again",
            registry=registry,
        )
        self.unmovable = Counter(
            "ares_unmovable_requests_total",
            "Requests that are never moved, by the sampling parameter whose state would be lost",
            ["reason"],
            registry=registry,
        )
        self.decisions = Counter(
            "ares_rebalance_decisions_total",
            "Periods of the rebalancer, by what it decided",
            ["result"],
            registry=registry,
        )
        self.waiting = Gauge("ares_waiting_requests", "Prefilled requests that wait for admission", registry=registry)
        self.suspended = Gauge(
            "ares_suspended_requests", "Suspended requests that wait to be admitted again", registry=registry
        )
        self.admissions = Counter(
            "ares_admission_decisions_total",
            "Decisions of admission, by kind: admit, resume, suspend",
            ["kind"],
            registry=registry,
        )
        self.oom_actions = Counter(
            "ares_oom_actions_total",
            "Requests moved or suspended before their instance runs out of memory",
            ["how"],
            registry=registry,
        )
        self.role_changes = Counter(
            "ares_role_changes_total",
            "Changes of role that were ordered here, by trigger (commanded, planned) and the role to have",
            ["trigger", "role"],
            registry=registry,
        )
        self.desired_instances = Gauge(
            "ares_desired_instances",
            "Instances of a role that the load needs, by the planner of roles; more or fewer than there are",
            ["role"],
            registry=registry,
        )
        self.role_load = Gauge(
            "ares_role_load_instances",
            "Load of a role, in instances that it would keep busy, by the planner of roles",
            ["role"],
            registry=registry,
        )
        self.faults = Counter(
            "ares_controller_faults_total",
            "Failed decisions, by part of the policy; serving continues without them",
            ["part"],
            registry=registry,
        )
        self.implausible = Counter(
            "ares_implausible_predictions_total",
            "Predictions that were not finite, negative, or out of order",
            registry=registry,
        )
        self.prediction_error = Histogram(
            "ares_prediction_error_tokens",
            "Error of the predicted remaining tokens of finished requests, by output tokens, part and version at the "
            "prediction",
            ["position", "side", "part", "version"],
            registry=registry,
            buckets=_TOKEN_BUCKETS,
        )
        self.instance_predicted = Gauge(
            "ares_instance_predicted_remaining_tokens",
            "Tokens that an instance's requests will still generate, by the medians of their predictions",
            ["instance"],
            registry=registry,
        )
        self.instance_up = Gauge(
            "ares_instance_up", "Whether an instance is healthy", ["instance", "role"], registry=registry
        )
        self.instance_resident = Gauge(
            "ares_instance_resident_tokens",
            "Tokens whose KV is on an instance",
            ["instance"],
            registry=registry,
        )
        self.instance_kv = Gauge(
            "ares_instance_kv_usage_ratio", "Share of an instance's KV blocks in use", ["instance"], registry=registry
        )
        self.instance_step = Gauge(
            "ares_instance_step_time_seconds", "Moving average of the step time", ["instance"], registry=registry
        )
        self.instance_running = Gauge(
            "ares_instance_running_requests", "Requests that run on an instance", ["instance"], registry=registry
        )
        self.instance_waiting = Gauge(
            "ares_instance_waiting_requests", "Requests in the queue of an instance", ["instance"], registry=registry
        )
        self.instance_preemptions = Gauge(
            "ares_instance_preemptions", "Preemptions since the instance started", ["instance"], registry=registry
        )
        self.instance_predictor = Gauge(
            "ares_instance_predictor_info",
            "1, with the version of the predictor that an instance runs; no version: none",
            ["instance", "version"],
            registry=registry,
        )
        self._learners()

    def _learners(self) -> None:
        """Make the metrics of what learners report."""
        registry = self.registry
        self.predictor_info = Gauge(
            "ares_predictor_info",
            "1, with version and kind of a learner's champion and challenger; a curve has no version",
            ["learner", "model", "version", "kind"],
            registry=registry,
        )
        self.predictor_loss = Gauge(
            "ares_predictor_loss_tokens",
            "Newest mean CRPS of curve, champion and challenger on outputs that none was trained on, by position",
            ["learner", "model", "position"],
            registry=registry,
        )
        self.predictor_recorded = Gauge(
            "ares_predictor_outputs_recorded", "Recorded outputs that a learner has", ["learner"], registry=registry
        )
        self.predictor_age = Gauge(
            "ares_predictor_report_age_seconds", "Age of a learner's newest report", ["learner"], registry=registry
        )
        self.predictor_events = Counter(
            "ares_predictor_events_total",
            "Events of learners, such as promoted, demoted, rejected, error",
            ["event"],
            registry=registry,
        )

    def refuse(self, route: str, status: int, code: str | None) -> None:
        """Count a request that was answered with an error of this code, if it has one."""
        self.refused.labels(route, str(status), reason(status, code)).inc()
