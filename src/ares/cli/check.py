"""`ares check`: the first hour on a cluster of one's own as one command."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ares.cli import instance_flags
from ares.terminal.errors import exit_with_error

if TYPE_CHECKING:
    from ares.check.run import Plan
    from ares.config import GatewayConfig
    from ares.local_cluster.cluster import ClusterSettings

_DEFAULT_PREFILL = 1
_START_TIMEOUT_S = 600.0
_errors = Console(stderr=True)


def check(
    context: typer.Context,
    worker: Annotated[
        list[str] | None,
        typer.Option(help="Base URL of a running instance; repeat for each. Without any, a cluster is started here."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model that the instances must serve; by default the first one's, or ares up's default."),
    ] = None,
    control_key_file: Annotated[
        Path | None, typer.Option(help="File with the control channel's key; or ARES_CONTROL_KEY (docs/security.md).")
    ] = None,
    worker_api_key_file: Annotated[Path | None, typer.Option(help="File with the instances' own API key.")] = None,
    outputs: Annotated[
        int, typer.Option(min=1, help="Outputs for each pair of instances; those that move use both modes in turns.")
    ] = 3,
    tokens: Annotated[int, typer.Option(min=48, help="Tokens of each output.")] = 64,
    log: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Log of an instance started with UCX_PROTO_INFO=y; repeat for each."),
    ] = None,
    step_limit: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Time limit of one check; above it, it has failed.")
    ] = 120.0,
    time_limit: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Time limit of all; the checks after it are not run.")
    ] = 1800.0,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill instances to start (1).")] = None,
    decode: Annotated[
        int | None, typer.Option(min=1, help="Decode instances to start: all that fit on the GPUs, without GPUs 2.")
    ] = None,
    share_gpus: Annotated[
        bool, typer.Option("--share-gpus", help="Let several started instances run on one GPU (docs/gpus.md).")
    ] = False,
    start_timeout: Annotated[
        float | None, typer.Option(min=1, metavar="SECONDS", help="How long started engines may take (600).")
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="Predictor of started instances, as for ares up: a checkpoint, or none.")
    ] = None,
    log_folder: Annotated[Path | None, typer.Option(help="Folder for the logs of started instances.")] = None,
    simulate: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="Start mock engines of this profile (docs/mock-engine.md).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write versions, machine, settings and all rows here.")
    ] = None,
) -> None:
    """Check that instances fit together, that requests move between them exactly,
    and what a move costs. Status 1: a check failed; 2: bad input.

    Give the URLs of running instances, or nothing to start a cluster here, as
    ares up does, with any flag of vLLM:

      ares check --worker http://10.0.0.1:8100 --worker http://10.0.0.2:8100

      ares check --dtype float32 --json check.json

    Each row is pass, warn, fail or not run, with what was measured and what to
    do. KV goes over every pair of instances: from prefill to decode, and from
    each decode instance to each other one while a request runs. The tokens
    are compared with those of an instance that computes everything itself.

    With --dtype float32, or in vLLM's batch-invariant mode, all must be equal.
    Otherwise rounding may change some: then the same requests without a
    transfer are the control. Instances may serve others meanwhile; times then
    include that load.

    The file of --json holds no keys and no prompts of users: attach it to a bug
    report. docs/operations.md explains the rows.
    """  # noqa: D205 - a line of the help, and no longer than a terminal
    from ares.engine import given_flags

    flags = [flag for flag in context.args if flag != "--"]
    if not worker:
        flags = given_flags.expand(flags)
    if worker:
        given: dict[str, object] = {
            "--prefill": prefill,
            "--decode": decode,
            "--share-gpus": share_gpus or None,
            "--start-timeout": start_timeout,
            "--predictor": predictor,
            "--log-folder": log_folder,
            "--simulate": simulate,
        }
        _refuse(given, flags, "no effect with --worker, since no instance is started")
    else:
        given = {"--log": log, "--control-key-file": control_key_file, "--worker-api-key-file": worker_api_key_file}
        _refuse(given, [], "no effect without --worker: the started instances are known")
        if simulate is not None:
            given = {"--predictor": predictor, "--share-gpus": share_gpus or None}
            _refuse(given, [], "no effect with --simulate: mock engines have their own predictor and use no GPU")
    _check_output(json_file)
    config = _config(worker, model, control_key_file, worker_api_key_file)
    from dataclasses import replace

    from ares.check.run import Plan
    from ares.engine.defaults import local_flags
    from ares.local_cluster import cluster as local
    from ares.models.resolve import DEFAULT_MODEL
    from ares.protocol.keys import ControlKey
    from ares.terminal.signals import signal_as_interrupt

    plan = Plan(
        urls=config.workers if worker else [],
        control_key=ControlKey(config.control_key.get_secret_value()) if config.control_key else None,
        api_key=config.worker_api_key.get_secret_value() if config.worker_api_key else None,
        logs=_logs(log or []),
        outputs=outputs,
        tokens=tokens,
        step_s=step_limit,
        total_s=time_limit,
    )
    settings: dict[str, Any] = {"started_here": not worker, "simulate": simulate, "flags": flags}
    if worker:
        _run(plan, model, settings, json_file)
        return
    cluster = local.ClusterSettings(
        model=model or DEFAULT_MODEL,
        prefill=_DEFAULT_PREFILL if prefill is None else prefill,
        decode=decode,
        log_folder=log_folder,
        worker_flags=("--predictor", predictor) if predictor is not None else (),
        vllm_flags=tuple(flags if simulate is not None else local_flags(flags)),
        simulate=simulate,
        share_gpus=share_gpus,
        start_timeout_s=start_timeout or _START_TIMEOUT_S,
    )
    cluster = _prepared(cluster, predictor)
    signal_as_interrupt()
    with local.workers_only(cluster, _errors) as running:
        running.start_workers()
        running.await_workers()
        started = {name: url for process in running.workers for name, url in process.instances.items()}
        logs = {name: process.log for process in running.workers for name in process.instances}
        _run(replace(plan, urls=list(started.values()), logs=logs), model, settings, json_file)


def _refuse(options: Mapping[str, object], flags: list[str], why: str) -> None:
    """Exit with an error where one of the options is given, or a flag."""
    if unused := [name for name, value in options.items() if value is not None] + flags:
        exit_with_error(f"{', '.join(unused)}: {why}")


def _check_output(json_file: Path | None) -> None:
    from ares.terminal.output_files import check_writable

    if json_file is None:
        return
    try:
        check_writable(json_file)
    except OSError as error:
        exit_with_error(f"--json {json_file}: {error.strerror}")


def _config(
    worker: list[str] | None, model: str | None, control_key_file: Path | None, worker_api_key_file: Path | None
) -> "GatewayConfig":
    """Return what a gateway's configuration makes of these options and of the variables."""
    from ares import config as configuration
    from ares.models.resolve import DEFAULT_MODEL
    from ares.protocol.keys import read_key

    return configuration.load(
        workers=worker or ["http://127.0.0.1:8100"],  # else not known yet
        model=model or DEFAULT_MODEL,
        control_key=read_key(control_key_file) if control_key_file else None,
        worker_api_key=read_key(worker_api_key_file) if worker_api_key_file else None,
    )


def _logs(given: list[str]) -> dict[str, Path]:
    found = {}
    for text in given:
        name, _, file = text.partition("=")
        if not name or not Path(file).is_file():
            exit_with_error(f"--log {text}: expected the name of an instance, =, and a file that exists")
        found[name] = Path(file)
    return found


def _prepared(cluster: "ClusterSettings", predictor: str | None) -> "ClusterSettings":
    """Return the cluster with its GPUs, once it is clear that it can be started.

    Its processes inherit the variables that make them tell more: what only the log of an instance shows, and what only
    its workers know.
    """
    from ares.check.ucx_log import VARIABLE
    from ares.engine import front_end_flags, refused_settings, vllm_version
    from ares.engine.prediction import predictor_choice
    from ares.local_cluster import cluster as local
    from ares.models import resolve as models
    from ares.protocol.keys import refuse_key_flag

    refuse_key_flag(cluster.vllm_flags)
    instance_flags.check(cluster.prefill, (), cluster.vllm_flags)
    if cluster.simulate is None:
        refused_settings.check(cluster.vllm_flags)
        front_end_flags.check(cluster.vllm_flags, up=False)
        vllm_version.require(allow_unsupported=False)  # before a model of gigabytes is fetched
    else:
        instance_flags.check_mock(cluster)
    cluster = local.with_gpus(cluster, os.environ, _errors)
    folder = models.resolve(cluster.model, weights=cluster.simulate is None, console=_errors)
    if predictor is not None:
        # Here too, so that an error is shown at once and not in the logs of the instances.
        predictor_choice.choose(predictor, cluster.model, folder)
    os.environ.setdefault(VARIABLE, "y")
    os.environ.setdefault("VLLM_SERVER_DEV_MODE", "1")
    return cluster


def _run(plan: "Plan", model: str | None, settings: dict[str, Any], json_file: Path | None) -> None:
    """Run the checks, print the table, write the file, and exit with 1 where one failed."""
    import asyncio
    from dataclasses import replace

    from ares.bench.environment import write
    from ares.check import report
    from ares.check.run import run
    from ares.terminal import tables
    from ares.terminal.progress import progress_display

    if model is not None:
        plan = replace(plan, served=_served(model))
    with progress_display(_errors) as progress:
        task = progress.add_task("check", total=None)
        done = asyncio.run(run(plan, lambda what: progress.update(task, description=what)))
    tables.show(report.table(report.in_order(done.rows)), report.summary(done.rows))
    write(report.result(done, plan, settings), json_file)
    if done.failed:
        raise typer.Exit(1)


def _served(model: str) -> Any:
    """Return the model as a gateway compares it with that of an instance."""
    from ares.gateway.pool.discovery import Served
    from ares.models import resolve as models

    folder = models.resolve(model, weights=False, console=_errors)
    path = Path(model).expanduser()
    return Served((str(path.resolve()) if path.is_dir() else model,), models.shape(folder))
