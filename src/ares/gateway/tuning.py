"""Times and limits of the gateway that are no settings: operators have no reason to change them, tests have."""

from dataclasses import dataclass

from ares.policy.admission import PREFILLED_KV_KEPT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Times in seconds, sizes in bytes, and counts; by the folder that uses them."""

    # pool: whether an instance can be used
    silent_s: float = 3.0
    """An instance without a report for this long, and for `silent_intervals`, is lost. A large prefill blocks its
    interpreter for a part of that."""
    silent_intervals: int = 20
    """In telemetry intervals, which matters where `telemetry_interval_s` is long."""
    frozen_s: float = 6.0
    """After this long without any message, an instance's requests are resumed elsewhere if they get no tokens."""
    first_report_s: float = 3.0
    """An instance that runs reports within this long after the gateway's start."""
    reconnect_s: float = 0.5
    """Between two attempts to find an instance."""
    duplicate_check_s: float = 2.0
    """Between two looks at the second URL of an instance: whether the first one still leads there."""
    health_log_lines: int = 10
    """Changes of status that are logged at once; then one in `health_log_line_s`, for an instance that flaps."""
    health_log_line_s: float = 60.0

    # pool: which instances there are
    leave_s: float = 60.0
    """The requests of an instance that nothing names any more have so long to end or to move."""
    file_period_s: float = 1.0
    """Between two looks at a file of instances."""
    dns_period_s: float = 5.0
    """Between two questions to the resolver."""
    kubernetes_resync_s: float = 300.0
    """A watch at Kubernetes' API server ends after this long; then all objects are listed anew."""
    kubernetes_answer_s: float = 30.0
    """For the API server to answer."""
    ray_period_s: float = 1.0
    """Between two questions to the directory of an application of Ray Serve."""
    ray_answer_s: float = 10.0
    """For it to answer."""
    source_retry_s: float = 2.0
    """After a source has failed, it is asked again after this long."""
    kept_changes: int = 200
    """Changes of instances' states that are shown."""

    # pool: the channels to an instance
    connect_s: float = 5.0
    """To connect to an instance. Its answer may take longer: a prefill of a long prompt waits behind others."""
    kept_connection_s: float = 4.0
    """After its last reply, a connection is used again only so soon: servers close idle ones, vLLM's after 5 s
    (`VLLM_HTTP_TIMEOUT_KEEP_ALIVE`)."""
    kept_connections: int = 256
    """Connections to an instance that are kept for other requests."""
    chunk_tokens: int = 32
    """Where an instance sends tokens after each step, its replies have them in chunks of so many (`stream_interval`):
    when a message of the step channel is lost, tokens come so much later. 1: no step channel."""
    unread_bytes: int = 1 << 18
    """A stream with more unread bytes pauses its engine."""
    reply_bytes: int = 4 << 20
    """Largest reply that is not streamed. No healthy engine sends a larger one."""
    event_bytes: int = 16 << 20
    """Largest event of a stream. An engine merges what its reader has left waiting: thousands of tokens of 1.6 kB, with
    20 log probabilities each."""
    kept_reports: int = 1024
    """Predictions and ends of pulls of an instance that are kept until they are asked for; most never are."""

    # session
    alive_s: float = 5.0
    """An instance that has sent a token, or was asked, within this long may be alive, even without telemetry."""
    report_lag_s: float = 1.0
    """How long a `CutResult` may trail the end of the stream that it explains, or a `KvReceived` the first token."""
    expect_s: float = 2.0
    """How long a target waits for a request that is moved to it: a cut takes two to three steps of its source."""
    pinned_kv_kept_s: float = PREFILLED_KV_KEPT_S
    """How long KV that waits to be pulled is sure to be there."""

    # control
    recovery_s: float = 3.0
    """An instance whose stream broke reports again within this long, if it is alive."""
    dispatch_retry_s: float = 0.2
    """Between two looks for an open instance, where no status changes meanwhile."""
    admission_shortest_s: float = 0.002
    """Least pause between two decisions of admission, which follow a change."""
    admission_longest_s: float = 0.25
    """Without a change, admission is decided again after this long."""
    prefix_wait_s: float = 0.5
    """A request waits so long for memory where its prompt is cached, before it may go elsewhere."""
    admission_share: float = 0.1
    """Largest share of a core that decisions of admission take, and looking up what is cached for those of copies."""
    decision_s: float = 0.5
    """A policy may take this long to decide, for a processor that is busy; to decide moves, a period if that is longer.
    For dispatch and admission requests wait."""
    length_curves: bool = False
    """Whether requests without predictions are told apart by what is known of them (docs/predictor.md says why not)."""
    kept_lengths: int = 2000
    """Lengths of ended outputs that are kept for an admission policy that has not been called for long."""
    lease_ttl_s: float = 3.0
    """A gateway that dies within its turn loses the lease after this long, if its connections do not break before."""
    lease_turn_s: float = 2.0
    """Moves that have not ended by then are not waited for before the lease is given back."""
    role_period_s: float = 2.0
    """Between two plans of the roles of instances."""
    closing_lease_s: float = 5.0
    """A drain or a change of role waits so long for the lease."""
    role_answer_s: float = 2.0
    """For an instance to answer an order of a role."""
    lease_answer_s: float = 0.5
    """For an instance to answer whether it grants the lease."""
    copy_s: float = 5.0
    """For a warm copy to be pulled."""
    copy_retry_s: float = 5.0
    """A request whose warm copy failed is not copied again before."""
    drain_period_s: float = 0.1
    """Between two looks for what can be moved off an instance that drains."""
    drain_moves: int = 4
    """Moves off one instance at a time: all at once would stall each other and flood the targets."""
    drain_retry_s: float = 1.0
    """A session that could not be moved off an instance is tried again after this long."""

    # service
    supervision_s: float = 1.0
    """Between two looks for sessions whose instance has frozen, or whose answer is overdue."""
    serving_check_s: float = 0.5
    """Requests that wait for the first instance check this often, and whenever the status of one changes."""
    retry_after_s: int = 120
    """Longest time after which a refused client is asked to try again."""
    backlog_capacities: int = 16
    """Default limit of the tokens outside decode, in multiples of the decode pool's KV capacity."""
    kept_migrations: int = 1000
    """Moves that the status shows."""
    learner_old_s: float = 60.0
    """A report of a learner that is older than this is shown as old: learners report several times a minute."""
    kept_learners: int = 4
    """Learners whose reports are kept."""
    kept_versions: int = 12
    """Versions of the predictor whose errors are counted apart; those of the oldest are dropped from the metrics."""

    # http: the feed of the dashboard
    feed_period_s: float = 1.0
    """Between two events."""
    feed_requests: int = 4000
    """Of more requests than this the largest are sent, so that an event stays below a megabyte."""
    feed_moves: int = 200
    """Moves that a viewer who comes late is sent."""


DEFAULT = Tuning()
