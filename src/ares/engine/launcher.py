"""`ares worker`: `vllm serve` with our connector, control channel and plugin filled in."""

import asyncio
import importlib.metadata
import json
import os
import sys
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ares import addresses, published_address
from ares.engine import (
    front_end_flags,
    given_flags,
    identity,
    kv_events,
    loaded_models,
    parallel,
    refused_settings,
    vllm_version,
)
from ares.engine.defaults import DEFAULT_DRAIN_S, DEFAULT_PULL_BYTES, is_cpu_build
from ares.engine.learning.flags import DEFAULT_AT_ONCE, LEARN, LearningFlags, OpenFolder
from ares.engine.learning.folder import version_of
from ares.engine.logs import follow_vllm
from ares.engine.prediction import predictor_choice
from ares.free_ports import free_port
from ares.models import resolve as models
from ares.predictor import shards
from ares.protocol.fields import CONTROL_KEY_VARIABLE, PULL_WITHIN_STEP_BYTES
from ares.protocol.messages import ROLES, Role

# How long the KV of a finished prefill or a cut request stays pinned; a target's heartbeats extend it (vLLM's default).
LEASE_S = 30
# Of the requests with `--record-hidden-states`.
_RECORD_FRACTION = 0.01

# `ares` is for serving; `ares bench overhead` compares it with the others.
Connector = Literal["ares", "stock", "none"]
_RESUME_OUTPUT_WORKER = "ares.engine.connector.resume_output.ResumeOutputWorker"
_PREDICTING_WORKER = "ares.engine.prediction.worker.PredictingWorker"
_MODULES = {"ares": "ares.engine.connector.connector", "stock": "ares.engine.connector.baselines"}


class LaunchError(RuntimeError):
    """The instance cannot start; the message says what to do."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The options of `ares worker`. A port of 0 means any free one.

    `host` is listened on, `advertise_host` is published (`published_address.published`). `predictor` is a checkpoint,
    ``none``, ``learn``, or None for the one that ships for the model, if any. `record_fraction` is None where it was
    not given.
    """

    model: str
    role: Role
    name: str
    host: str
    port: int
    advertise_host: str | None = None
    control_port: int = 0
    nixl_port: int = 0
    cores: str | None = None
    connector: Connector = "ares"
    pull_within_step_bytes: int = DEFAULT_PULL_BYTES
    predictor: str | None = None
    record_folder: Path | None = None
    record_fraction: float | None = None
    learning: LearningFlags = field(default_factory=LearningFlags)
    drain_deadline_s: float = DEFAULT_DRAIN_S
    fixed_role: bool = False
    control_insecure: bool = False
    allow_unsupported_vllm: bool = False
    vllm_flags: tuple[str, ...] = ()


def serve(settings: WorkerSettings) -> None:
    """Run one instance until it is stopped.

    Raises
    ------
    LaunchError, LearningError, AddressError, FrontEndFlagError, MissingPackageError, RefusedSettingError,
    UnsupportedVllmError
        It cannot start.
    """
    check_control(settings.host, insecure=settings.control_insecure or settings.connector != "ares")
    published = published_address.published(settings.host, settings.advertise_host)
    # Before anything is loaded; and vLLM waits forever for a NIXL side channel whose port is taken, and shares a taken
    # HTTP port.
    ports = {"--port": settings.port, "--control-port": settings.control_port, "--nixl-port": settings.nixl_port}
    addresses.check(settings.host, {flag: [port] for flag, port in ports.items()})
    refused_settings.check(settings.vllm_flags)
    front_end_flags.check(settings.vllm_flags, up=False)
    _check_recording(settings)
    vllm_version.require(allow_unsupported=settings.allow_unsupported_vllm)  # before a model of gigabytes is fetched
    folder = models.resolve(settings.model)
    control_port = settings.control_port or free_port(settings.host)
    # vLLM both listens on it and publishes it; our connector publishes the other one (engine/connector/scheduler.py).
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = settings.host if settings.connector == "ares" else published
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(settings.nixl_port or free_port(settings.host))
    os.environ["VLLM_PLUGINS"] = _plugins()
    cores = _cores(settings)
    if settings.cores:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = settings.cores
    if cores:
        # One process instead of two on a CPU: vLLM's worker process spins while it waits for the scheduler's, and
        # starves an instance that shares its cores. Read by vLLM's CPU platform only (platforms/cpu.py).
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["OMP_NUM_THREADS"] = str(len(cores))
    learning = None
    if settings.learning.learns(settings.predictor):
        learning = settings.learning.open_folder(settings.model, settings.name)
    predictor = _predictor(settings, folder, learning)
    resumes_output = settings.connector == "ares" and not _has_flag(settings, "worker-cls")
    predicts = predictor is not None or settings.record_folder is not None or learning is not None
    if resumes_output or predicts:
        worker = _PREDICTING_WORKER if predicts else _RESUME_OUTPUT_WORKER
        settings = replace(settings, vllm_flags=(*settings.vllm_flags, "--worker-cls", worker))
    identity.export(
        identity.InstanceSettings(
            name=settings.name,
            role=settings.role,
            boot=uuid.uuid4().hex,
            control_address=identity.control_address(published, control_port),
            listen_host=settings.host,
            cores=cores,
            model=settings.model,
            resumes_output=resumes_output,
            predictor=str(predictor.resolve()) if predictor is not None else "",
            predictor_version=version_of(predictor) if predictor is not None else "",
            record_folder=str(settings.record_folder.resolve()) if settings.record_folder is not None else "",
            record_fraction=_RECORD_FRACTION if settings.record_fraction is None else settings.record_fraction,
            learn_folder=str(learning.folder.path) if learning is not None else "",
            record_at_once=settings.learning.record_at_once or DEFAULT_AT_ONCE,
            record_token_ids=settings.learning.record_token_ids,
            # Without our connector there is no channel to tell gateways of a drain.
            drain_deadline_s=settings.drain_deadline_s if settings.connector == "ares" else 0.0,
            roles=(settings.role,) if settings.fixed_role else ROLES,
        )
    )
    _check_packages()
    # Only now: vLLM reads the environment while it is imported.
    import uvloop

    try:
        from ares.engine import vllm_api as vllm
    except ImportError as error:
        raise LaunchError(f"vLLM {vllm_version.installed()} lacks a name that ARES uses: {error}") from error

    follow_vllm()
    on_cpu = vllm.current_platform.is_cpu()
    if on_cpu:
        os.environ.setdefault("UCX_TLS", "tcp,shm,self")
    vllm.cli_env_setup()
    parser = vllm.make_arg_parser(vllm.FlexibleArgumentParser(prog="ares worker"))
    given = parser.parse_args(["--model", str(folder), *settings.vllm_flags])
    defaults = parser.parse_args(["--model", str(folder)])
    refused_settings.check_parsed(given, defaults)
    front_end_flags.check_parsed(given, defaults)
    args = parser.parse_args(_vllm_arguments(settings, str(folder), on_cpu))
    if (reason := parallel.unsupported(args) or loaded_models.unsupported(args, on_cpu=on_cpu)) is not None:
        raise LaunchError(reason)
    vllm.validate_parsed_serve_args(args)
    try:
        uvloop.run(vllm.run_server(args))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(0)


def check_control(host: str, *, insecure: bool) -> None:
    """Check that no other host can send commands to the instance without a key.

    Raises
    ------
    LaunchError
        Its control channel would be open to other hosts.
    KeyFileError
        The key cannot be used.
    """
    if identity.control_key() is not None or insecure:
        return
    try:
        if addresses.on_loopback(host):
            return
    except OSError as error:
        raise LaunchError(f"--host {host}: {error}") from error
    raise LaunchError(
        f"the control channel on {host} would take commands from any host that reaches it: give all instances and "
        f"gateways one key (--control-key-file or {CONTROL_KEY_VARIABLE}), or allow that: --control-insecure "
        "(docs/security.md)"
    )


def _vllm_arguments(settings: WorkerSettings, folder: str, on_cpu: bool) -> list[str]:
    flags = list(settings.vllm_flags)
    transfer: dict[str, Any] = {
        "kv_connector": "NixlConnector",
        "kv_connector_module_path": _MODULES.get(settings.connector),
        # A decode instance pulls from prefill instances and serves pulls of other decode instances.
        "kv_role": "kv_both",
        # A failed pull costs a recomputation, not the request.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "kv_lease_duration": LEASE_S,
            PULL_WITHIN_STEP_BYTES: settings.pull_within_step_bytes,
        },
    }
    if on_cpu:
        transfer["kv_buffer_device"] = "cpu"
    arguments = ["--model", folder, "--host", settings.host, "--port", str(settings.port), "--enable-scale-out"]
    if settings.connector != "none":
        arguments += ["--kv-transfer-config", json.dumps(transfer)]
    given = given_flags.names(flags)
    if "scheduling-policy" not in given:
        # Out of memory, vLLM then preempts the request with the largest predicted memory-time, not the newest one. In
        # every role, since that may change: prefills have no priority, and remain in the order of their arrival.
        arguments += ["--scheduling-policy", "priority"]
    if settings.connector == "ares" and "kv-events-config" not in given:
        arguments += ["--kv-events-config", kv_events.FLAG_VALUE]
    if "served-model-name" not in given:
        arguments += ["--served-model-name", settings.model]
    return arguments + flags


def _has_flag(settings: WorkerSettings, name: str) -> bool:
    return name in given_flags.names(settings.vllm_flags)


def _check_recording(settings: WorkerSettings) -> None:
    """Raise LaunchError or LearningError for flags that do not go together."""
    recording = settings.record_folder is not None
    if settings.record_fraction is not None and not recording:
        raise LaunchError("--record-fraction changes nothing without --record-hidden-states")
    settings.learning.check(
        settings.predictor, records_by_hand=recording, connector=settings.connector, flags=settings.vllm_flags
    )
    if _has_flag(settings, "worker-cls") and (
        recording or settings.predictor not in {None, predictor_choice.NONE, LEARN}
    ):
        raise LaunchError("--worker-cls and a predictor or recorder exclude each other: both replace vLLM's worker")


def _predictor(settings: WorkerSettings, folder: Path, learning: OpenFolder | None) -> Path | None:
    """Return the checkpoint to run with; PredictorError where one was given that does not fit."""
    if settings.record_folder is not None:
        shards.writable(settings.record_folder)
    # Predictions leave through our connector.
    if settings.connector != "ares" or _has_flag(settings, "worker-cls"):
        return None
    if learning is not None:
        ships = settings.predictor != LEARN
        given = settings.predictor if ships else None
        return predictor_choice.begin(learning.folder, given, settings.model, folder, ships=ships)
    return predictor_choice.choose(settings.predictor, settings.model, folder)


def _cores(settings: WorkerSettings) -> tuple[int, ...]:
    """Return the cores to run on where this machine computes on its CPU with one worker; else nothing.

    Raises
    ------
    LaunchError
        The cores are not given as numbers and ranges, such as ``0-3,6``.
    """
    ranks = {"tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size"}
    if not is_cpu_build() or ranks & given_flags.names(settings.vllm_flags):
        return ()
    if settings.cores is None:
        return tuple(sorted(os.sched_getaffinity(0)))
    try:
        spans = [[int(end) for end in span.split("-")] for span in settings.cores.split(",")]
        return tuple(core for span in spans for core in range(span[0], span[-1] + 1))
    except ValueError as error:
        raise LaunchError(f"--cores {settings.cores}: expected numbers and ranges, such as 0-3,6") from error


def _plugins() -> str:
    """Name our plugin without hiding others: once VLLM_PLUGINS is set, vLLM loads only what it lists."""
    if "VLLM_PLUGINS" in os.environ:
        return f"{os.environ['VLLM_PLUGINS']},ares"
    groups = (f"vllm.{kind}_plugins" for kind in ("general", "platform", "io_processor", "stat_logger"))
    others = {point.name for group in groups for point in importlib.metadata.entry_points(group=group)}
    return ",".join(sorted(others | {"ares"}))


def _check_packages() -> None:
    try:
        import transformers  # noqa: F401
    except RuntimeError as error:
        if "torchvision" in str(error):
            raise LaunchError(
                "torchvision does not match torch here and keeps transformers from loading; text models need none of "
                "it: pip uninstall torchvision torchaudio torchcodec"
            ) from error
        raise
    try:
        import nixl  # noqa: F401
        import vllm  # noqa: F401
    except ImportError as error:
        raise LaunchError(f"vLLM and NIXL are installed, but cannot be loaded: {error}") from error
