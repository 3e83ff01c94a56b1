"""Names that both sides of a process boundary use: fields, reasons, states, routes, headers, variables.

Gateways and instances of different versions work together: a value here never changes, even if its name does.
"""

from enum import StrEnum

# --- kv_transfer_params of a request, ours (vLLM passes on what it does not know) ---

KV_TRANSFER_PARAMS = "kv_transfer_params"
# The gateway's key of the request: vLLM appends a suffix to request ids.
KEY = "ares_key"
# How many tokens at the end of the prompt are output of other instances.
GENERATED_TOKENS = "ares_generated"
# Whether these tokens become output on this instance too (engine/connector/resume_output.py).
RESUME_OUTPUT = "ares_restore"
# These tokens, on their way from the engine's scheduler to its workers.
RESUMED_TOKENS = "ares_output"
# Marks a request without a client: it only copies KV to an instance, ahead of the request itself.
PRECOPY = "ares_ahead"
# Whether the tokens of the request are sent over the control channel, too, after each step (`messages.StepTokens`).
STEP_TOKENS = "ares_step_tokens"
# In the result of a prefill that has not computed the whole prompt: its token is not the first of the output.
PROMPT_SHORTENED = "ares_prompt_shortened"
# In the result of a prefill: tokens of its prompt that the prefix cache of the instance held.
CACHED_TOKENS = "ares_cached_tokens"
# What the predictor of another instance knows of the request: its forecast from the first state, and the average of the
# states (`messages.Predicted.forecast`, and in the kv_transfer_params of a cut).
FIRST_FORECAST = "ares_first_forecast"

# --- and vLLM's own (v1/nixl/pull_scheduler.py, 0.32) ---

DO_REMOTE_DECODE = "do_remote_decode"
DO_REMOTE_PREFILL = "do_remote_prefill"
REMOTE_BLOCK_IDS = "remote_block_ids"
REMOTE_ENGINE_ID = "remote_engine_id"
REMOTE_HOST = "remote_host"
REMOTE_NUM_TOKENS = "remote_num_tokens"
REMOTE_PORT = "remote_port"
REMOTE_REQUEST_ID = "remote_request_id"
TP_SIZE = "tp_size"

# --- other parts of a request and its reply ---

# In sampling_params.extra_args (a client's vllm_xargs), for a mock engine: the length of the whole output.
MOCK_OUTPUT_TOKENS = "ares_mock_output_tokens"
# And the token ids of the whole output, its stop token left out.
MOCK_TOKENS = "ares_mock_tokens"
# The stop reason of a request that ended on one instance to continue on another.
MIGRATED = "migrated"
# vLLM's stop reason and finish reason of an output that `repetition_detection` has ended (v1/core/sched/utils.py).
REPETITION_DETECTED = "repetition_detected"
REPETITION = "repetition"
# What a request keeps when it resumes on another instance (`messages.Hello.carries`): which tokens are output, the
# position of a seeded generator, the position in a grammar.
CARRIES_OUTPUT = "output"
CARRIES_SEED = "seed"
CARRIES_STRUCTURED_OUTPUTS = "structured_outputs"
# And where the reasoning ends, for a grammar that begins there: `reasoning_ended` and `reasoning_parser_kwargs` of the
# engine's request are those of the first one, as of the prompt alone.
CARRIES_STRUCTURED_OUTPUTS_AFTER_REASONING = "structured_outputs_after_reasoning"


class RequestState(StrEnum):
    """The state of a request on an instance (`messages.Row.state`)."""

    WAITING = "waiting"
    # Its KV is being pulled.
    LOADING = "loading"
    RUNNING = "running"
    # Not a client's request: it copies KV ahead of one (`PRECOPY`).
    COPYING = "copying"


class CutOutcome(StrEnum):
    """The outcome of a `messages.Cut`."""

    # The request ended here, and its KV waits to be pulled.
    PINNED = "pinned"
    # It ended by itself, or was aborted, first.
    FINISHED = "finished"
    # Nothing of it is in flight (it waits, is preempted, or its KV is loading); nothing was changed.
    NOT_RUNNING = "not_running"
    # There is no such request; nothing was changed.
    UNKNOWN = "unknown"


class Readiness(StrEnum):
    """The status in a reply of `READY_ROUTE`."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


# --- HTTP of an instance: ours, vLLM's, the mock engine's ---

INSTANCE_ROUTE = "/ares/v1/instance"
READY_ROUTE = "/ares/v1/ready"
GENERATE_ROUTE = "/inference/v1/generate"
MODELS_ROUTE = "/v1/models"
COUNTERS_ROUTE = "/simulate/counters"
FAULTS_ROUTE = "/simulate/faults"

# A method of an instance's workers (`collective_rpc`): what `ares check` asks of the hidden-state hook. It begins to
# record with `on`, ends with `off`, and is emptied with `take`.
RECORDED_STATES_METHOD = "ares_recorded_states"

# --- HTTP of the gateway ---

REQUEST_ID_HEADER = "x-request-id"
CLASS_HEADER = "x-ares-class"

# --- environment variables and other settings that one of our processes hands to another ---

CONTROL_KEY_VARIABLE = "ARES_CONTROL_KEY"
# `ares worker` to the processes of vLLM: the instance's settings as JSON (engine/identity.py).
INSTANCE_VARIABLE = "ARES_INSTANCE"
# Whether an instance may run on a vLLM that is not supported.
ALLOW_UNSUPPORTED_VLLM_VARIABLE = "ARES_ALLOW_UNSUPPORTED_VLLM"
# In vLLM's kv_connector_extra_config: the largest pull within a scheduling step.
PULL_WITHIN_STEP_BYTES = "ares_pull_within_step_bytes"
