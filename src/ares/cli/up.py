"""`ares up`: a local cluster behind one endpoint."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console

from ares.bench.options import Model
from ares.cli import instance_flags, learn_choice
from ares.cli.options import LAST_PORT, AllowUnsupportedVllm, OtlpTracesEndpoint, Policies, Simulate
from ares.models.resolve import DEFAULT_MODEL
from ares.protocol.keys import read_keys, refuse_key_flag
from ares.terminal.errors import exit_with_error
from ares.terminal.http_client import proxy_by_variables
from ares.terminal.signals import signal_as_interrupt

if TYPE_CHECKING:
    from ares.config import GatewayConfig
    from ares.local_cluster.cluster import ClusterSettings

# Settings that it gives to its gateway itself.
_SET_BY_UP = ("model", "workers", "host", "port", "preset", "shutdown_timeout_s")
_errors = Console(stderr=True)


def up(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill instances; 0 lets decode instances do both.")] = 1,
    decode: Annotated[
        int | None, typer.Option(min=1, help="Decode instances; by default all that fit on the GPUs, without GPUs 2.")
    ] = None,
    prefill_args: Annotated[
        str, typer.Option(metavar="FLAGS", help='Further flags of vLLM for prefill instances: "--max-num-seqs 8".')
    ] = "",
    decode_args: Annotated[str, typer.Option(metavar="FLAGS", help="And for decode instances.")] = "",
    share_gpus: Annotated[
        bool, typer.Option("--share-gpus", help="Let several instances run on one GPU (docs/gpus.md).")
    ] = False,
    start_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="How long the engines may take to start.")
    ] = 600.0,
    host: Annotated[str, typer.Option(help="Address of the endpoint.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the endpoint.", min=1, max=LAST_PORT)] = 8000,
    preset: Annotated[str, typer.Option(help="Policy preset, or its YAML file (docs/policy.md).")] = "ares",
    policy: Policies = None,
    gateway_processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=64, help="Processes of the gateway, one core each.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the keys of clients, one a line.")] = None,
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="End with an error when a process ends, instead of restarting it.")
    ] = False,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint of `ares predictor train`; none; or learn: begin without one, learned from the requests. "
            "By default the one that ships for the model."
        ),
    ] = None,
    learn: Annotated[
        bool | None,
        typer.Option(
            "--learn/--no-learn",
            help="Learn a predictor from the requests (docs/learning.md); by default where none ships for the model.",
        ),
    ] = None,
    learn_folder: Annotated[
        Path | None, typer.Option(help="Folder of the learner; by default one for the model, in the cache.")
    ] = None,
    otlp_traces_endpoint: OtlpTracesEndpoint = None,
    log_folder: Annotated[Path | None, typer.Option(help="Folder for the logs; by default a new one.")] = None,
    allow_unsupported_vllm: AllowUnsupportedVllm = False,
    simulate: Simulate = None,
) -> None:
    """Start a local cluster behind one endpoint, restart processes that end, and stop everything on Ctrl-C.

    Every other flag goes to each vLLM instance, for example --max-model-len 4096, or to the mock engines; those of
    vLLM's front end, such as --chat-template, go to the gateway (docs/api.md). On GPUs each instance gets its own, as
    many as --tensor-parallel-size (docs/gpus.md).
    """
    from ares import plugins, variables
    from ares.config import GatewayConfig, check_policies, live_preset
    from ares.engine import front_end_flags, given_flags, refused_settings, vllm_version
    from ares.engine.defaults import local_flags
    from ares.engine.prediction import predictor_choice
    from ares.local_cluster import cluster as local
    from ares.local_cluster.supervision import Supervisor
    from ares.models import resolve as models

    flags = given_flags.expand([flag for flag in context.args if flag != "--"])
    front_end = front_end_flags.split(flags)
    prefill_flags = _role_flags("--prefill-args", prefill_args)
    decode_flags = _role_flags("--decode-args", decode_args)
    every_flag = [*front_end.instance_flags(), *prefill_flags, *decode_flags]
    refuse_key_flag(every_flag)
    instance_flags.check(prefill, prefill_flags, every_flag)
    if simulate is None:
        refused_settings.check(every_flag)
    front_end_flags.check(every_flag, up=True)
    if share_gpus and simulate is not None:
        exit_with_error("--share-gpus has no effect with --simulate: mock engines use no GPU")
    try:
        plugins.load(policy or ())
        check_policies(policy or (), live_preset(preset), preset)
    except ValueError as error:
        exit_with_error(str(error))
    learn_choice.check(learn, learn_folder, predictor, simulated=simulate is not None)
    for warning in variables.warnings(GatewayConfig.model_fields, overruled=_SET_BY_UP):
        _errors.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    settings = local.ClusterSettings(
        model=model,
        prefill=prefill,
        decode=decode,
        host=host,
        port=port,
        preset=preset,
        log_folder=log_folder,
        vllm_flags=tuple(flags if simulate is not None else local_flags(flags)),
        gateway_flags=(
            *(("--api-key-file", str(api_key_file)) if api_key_file is not None else ()),
            *(("--processes", str(gateway_processes)) if gateway_processes is not None else ()),
            *(word for file in policy or () for word in ("--policy", str(Path(file).resolve()))),
        ),
        prefill_flags=prefill_flags,
        decode_flags=decode_flags,
        simulate=simulate,
        start_timeout_s=start_timeout,
        share_gpus=share_gpus,
    )
    if simulate is None:
        vllm_version.require(allow_unsupported=allow_unsupported_vllm)  # before a model of gigabytes is fetched
    endpoint = _endpoint(model, host, port, api_key_file, front_end.settings, otlp_traces_endpoint)
    settings = replace(settings, tls=endpoint.tls_certificate is not None)
    settings = _traced(settings, endpoint.otlp_traces_endpoint)
    settings = local.with_gpus(settings, os.environ, _errors)  # before a model of gigabytes is fetched, too
    folder = models.resolve(model, weights=simulate is None, console=_errors)
    tokenizer = front_end.settings.get("tokenizer")
    if tokenizer is not None and not Path(tokenizer).expanduser().is_dir():
        models.resolve(tokenizer, weights=False, console=_errors)
    learning = learn_choice.choose(
        learn, learn_folder, predictor, model, simulated=simulate is not None, console=_errors
    )
    settings = replace(
        settings,
        worker_flags=learning.worker_flags,
        learn_folder=learning.folder,
        learner_flags=learning.learner_flags,
    )
    if simulate is not None:
        instance_flags.check_mock(settings)
    elif learning.predictor not in (None, learn_choice.LEARN):
        # Here too, so that an error is shown at once and not in the logs of the instances.
        predictor_choice.choose(learning.predictor, model, folder)
    signal_as_interrupt()
    try:
        with local.running(settings, _errors) as cluster:
            _welcome(cluster, keys=bool(endpoint.api_keys))
            cluster.wait() if no_restart else Supervisor(cluster).run()
    except KeyboardInterrupt:
        _errors.print("stopped")


def _endpoint(
    model: str,
    host: str,
    port: int,
    api_key_file: Path | None,
    front_end: dict[str, Any],
    otlp_traces_endpoint: str | None,
) -> "GatewayConfig":
    """Return the gateway's settings, checked before the engines start."""
    from ares import addresses
    from ares import config as configuration

    config = configuration.load(
        workers=["http://127.0.0.1:8100"],  # not known yet
        model=model,
        host=host,
        port=port,
        api_keys=read_keys(api_key_file) if api_key_file is not None else None,
        otlp_traces_endpoint=otlp_traces_endpoint,
        **front_end,
    )
    addresses.check(host, {"--port": [port]})
    if (warning := config.exposure()) is not None:
        _errors.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return config


def _traced(settings: "ClusterSettings", url: str | None) -> "ClusterSettings":
    """Let gateway and instances send their spans to a collector."""
    from ares.gateway.tracing import settings as tracing

    if url is None:
        return settings
    tracing.check(url)
    flags = ("--otlp-traces-endpoint", url)
    settings = replace(settings, gateway_flags=(*settings.gateway_flags, *flags))
    if settings.simulate is not None:  # mock engines have no spans
        return settings
    os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")  # vLLM's default is gRPC
    return replace(settings, vllm_flags=(*settings.vllm_flags, *flags))


def _role_flags(option: str, text: str) -> tuple[str, ...]:
    from ares.engine import front_end_flags, given_flags

    try:
        words = shlex.split(text)
    except ValueError as error:
        exit_with_error(f"{option} {text!r}: {error}")
    if words and not words[0].startswith("-"):
        exit_with_error(f"{option} {text!r}: expected flags of vLLM, such as {option} '--max-num-seqs 64'")
    flags = tuple(given_flags.expand(words))
    if taken := front_end_flags.split(flags).settings:
        name = next(iter(taken)).replace("_", "-")
        exit_with_error(f"{option}: --{name} is for all instances and their gateway: give it to `ares up` itself")
    return flags


def _welcome(cluster: Any, *, keys: bool) -> None:
    body = json.dumps(
        {
            "model": cluster.settings.model,
            "messages": [{"role": "user", "content": "What is gravity?"}],
            "max_tokens": 400,
            "stream": True,
        }
    )
    key = ' -H "Authorization: Bearer $KEY"' if keys else ""
    typer.echo(f"serving {cluster.settings.model} on {cluster.url}/v1 (logs: {cluster.log_folder})\n")
    if proxy_by_variables(cluster.url) is not None:
        typer.echo(f"  export NO_PROXY={urlsplit(cluster.url).hostname}  # otherwise clients use your proxy for it")
    typer.echo(f"  curl -N {cluster.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'\n")
    typer.echo("Running requests: ares status. Stop: Ctrl-C.")
