"""The `ares` command."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console

from ares import __version__, published_address
from ares.bench.options import Model
from ares.cli import check as check_cli
from ares.cli import instance_flags, learn_choice
from ares.cli import operator as operator_cli
from ares.cli.deferred_commands import Deferred
from ares.cli.errors import run_app
from ares.cli.options import LogFormat, LogLevel, OtlpTracesEndpoint, Policies, Settings
from ares.engine.defaults import DEFAULT_DRAIN_S, DEFAULT_PULL_BYTES
from ares.models.resolve import DEFAULT_MODEL
from ares.protocol.fields import CONTROL_KEY_VARIABLE
from ares.protocol.keys import read_key, read_keys, refuse_key_flag
from ares.terminal.errors import exit_with_error
from ares.terminal.http_client import proxy_by_variables
from ares.terminal.signals import signal_as_interrupt

if TYPE_CHECKING:
    from ares.config import GatewayConfig
    from ares.local_cluster.cluster import ClusterSettings

app = typer.Typer(
    name="ares",
    help="Prefill-decode disaggregated serving on stock vLLM that migrates running requests.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
# Their modules are imported when one of their commands is called: together they import most of ARES.
for group, module, text in (
    ("bench", "ares.cli.bench", "Measure ARES."),
    (
        "simulate",
        "ares.cli.simulate",
        "Replay a trace over a simulated prefill-decode cluster, with the policy code of the live service.",
    ),
    (
        "predictor",
        "ares.cli.predictor",
        "Train and evaluate a predictor of remaining output length, on the model's own hidden states.",
    ),
):
    app.add_typer(typer.Typer(cls=Deferred.of(module)), name=group, help=text)
for command in (
    operator_cli.status,
    operator_cli.migrate,
    operator_cli.drain,
    operator_cli.undrain,
    operator_cli.role,
    operator_cli.preset,
    operator_cli.replay,
):
    app.command()(command)
app.command(context_settings=_PASS_THROUGH)(check_cli.check)
_errors = Console(stderr=True)
_LAST_PORT = 65535

Predictor = Annotated[
    str | None,
    typer.Option(help="Checkpoint of `ares predictor train`, or none; by default the one that ships for the model."),
]
# Settings that `ares up` gives to its gateway itself.
_SET_BY_UP = ("model", "workers", "host", "port", "preset", "shutdown_timeout_s")
ControlKeyFile = Annotated[
    Path | None, typer.Option(help="File with the control channel's key; or ARES_CONTROL_KEY (docs/security.md).")
]
AllowUnsupportedVllm = Annotated[
    bool, typer.Option("--allow-unsupported-vllm", help="Try a version of vLLM that ARES does not support.")
]
Simulate = Annotated[
    str | None, typer.Option(metavar="PROFILE", help="Use mock engines of this profile (docs/mock-engine.md).")
]


def main() -> None:
    """Run the command."""
    run_app(app)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ares {__version__}")
        raise typer.Exit


@app.callback()
def ares(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options before a command."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@app.command(context_settings=_PASS_THROUGH)
def worker(
    context: typer.Context,
    role: Annotated[str, typer.Option(help="prefill, decode or both.")],
    model: Model = DEFAULT_MODEL,
    name: Annotated[str | None, typer.Option(help="Name of the instance; by default role and port.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 and :: are every one.")] = "127.0.0.1",
    advertise_host: Annotated[
        str | None,
        typer.Option(help="Address that gateways and instances reach it by; by default --host (docs/operations.md)."),
    ] = None,
    port: Annotated[int, typer.Option(help="HTTP port.", max=_LAST_PORT, min=0)] = 8100,
    control_port: Annotated[
        int, typer.Option(help="Port of the control channel; 0 takes a free one.", max=_LAST_PORT, min=0)
    ] = 0,
    nixl_port: Annotated[
        int, typer.Option(help="Port of NIXL's side channel; 0 takes a free one.", max=_LAST_PORT, min=0)
    ] = 0,
    cores: Annotated[str | None, typer.Option(help="CPU builds: cores for the model, such as 0-3.")] = None,
    pull_within_step_bytes: Annotated[
        int, typer.Option(min=0, help="Largest KV pull within a scheduling step (docs/migration.md); 0 turns it off.")
    ] = DEFAULT_PULL_BYTES,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint of `ares predictor train`, none, or learn (--learn, beginning without one); by default "
            "the one that ships for the model."
        ),
    ] = None,
    record_hidden_states: Annotated[
        Path | None, typer.Option(help="Record requests as training data of the predictor in this folder.")
    ] = None,
    record_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the requests to record; 0.01 by default.")
    ] = None,
    learn: Annotated[
        bool | None,
        typer.Option(
            "--learn/--no-learn",
            help="Record some requests for a learner, and take its predictors (docs/predictor.md).",
        ),
    ] = None,
    learn_folder: Annotated[
        Path | None, typer.Option(help="Folder for --learn; by default in the cache, by model and name.")
    ] = None,
    record_at_once: Annotated[
        int | None, typer.Option(min=1, help="With --learn: requests that are recorded at once; 16 by default.")
    ] = None,
    record_token_ids: Annotated[
        bool, typer.Option("--record-token-ids", help="With --learn: record their token ids, too.")
    ] = False,
    drain_deadline: Annotated[
        float, typer.Option(min=0, help="Seconds that a SIGTERM waits for requests to leave; 0 ends at once.")
    ] = DEFAULT_DRAIN_S,
    fixed_role: Annotated[
        bool, typer.Option("--fixed-role", help="Keep this role: refuse `ares role` and the planner of roles.")
    ] = False,
    control_key_file: ControlKeyFile = None,
    control_insecure: Annotated[
        bool, typer.Option("--control-insecure", help="Take commands from any host, without a key.")
    ] = False,
    allow_unsupported_vllm: AllowUnsupportedVllm = False,
    connector: Annotated[
        str, typer.Option(hidden=True, help="Connector, for measurements: ares, stock or none.")
    ] = "ares",
    simulate: Simulate = None,
) -> None:
    """Start one vLLM instance that can hand over running requests.

    Every other flag goes to `vllm serve` as it is, for example --max-model-len 4096 or --tensor-parallel-size 2; with
    --simulate, to the mock engine (--simulate PROFILE -- --help).
    """
    from ares.engine import given_flags
    from ares.engine.launcher import LaunchError, WorkerSettings, check_control, serve
    from ares.engine.learning.flags import LearningError, LearningFlags

    if role not in ("prefill", "decode", "both"):
        exit_with_error(f"unknown role {role!r}: prefill, decode or both")
    flags = given_flags.expand([flag for flag in context.args if flag != "--"])
    refuse_key_flag(flags)
    if control_key_file is not None:
        # The processes of the instance inherit it; a variable is readable by its owner only, unlike a command line.
        os.environ[CONTROL_KEY_VARIABLE] = read_key(control_key_file)
    if simulate is not None:
        instance_flags.refuse_for_mock(context)
        try:
            check_control(host, insecure=control_insecure)
        except LaunchError as error:
            exit_with_error(str(error))
        published = published_address.published(host, advertise_host)
        identity = (name, role, host, port, control_port)
        _serve_mock(simulate, model, flags, identity, published, drain_deadline, fixed_role=fixed_role)
        return
    try:
        serve(
            WorkerSettings(
                model=model,
                role=role,  # type: ignore[arg-type] # checked above
                name=name or f"{role}-{port}",
                host=host,
                port=port,
                advertise_host=advertise_host,
                control_port=control_port,
                nixl_port=nixl_port,
                cores=cores,
                pull_within_step_bytes=pull_within_step_bytes,
                predictor=predictor,
                record_folder=record_hidden_states,
                record_fraction=record_fraction,
                learning=LearningFlags(learn, learn_folder, record_at_once, record_token_ids),
                drain_deadline_s=drain_deadline,
                fixed_role=fixed_role,
                control_insecure=control_insecure,
                allow_unsupported_vllm=allow_unsupported_vllm,
                connector=connector,  # type: ignore[arg-type] # an unknown one fails in vLLM
                vllm_flags=tuple(flags),
            )
        )
    except (LaunchError, LearningError) as error:
        exit_with_error(str(error))


def _serve_mock(
    profile: str,
    model: str,
    flags: list[str],
    identity: tuple[str | None, Any, str, int, int],
    advertise_host: str,
    drain_deadline_s: float,
    *,
    fixed_role: bool,
) -> None:
    import logging

    from ares import addresses
    from ares.mock_engine import model as mock_model
    from ares.mock_engine import serve, settings
    from ares.models import resolve as models
    from ares.simulator.profile import ProfileError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        engine, instances = settings.parse(profile, model, flags)
        *_, host, port, control_port = identity
        ports = {"--port": port, "--control-port": control_port}
        addresses.check(host, {flag: range(first, first + instances) if first else () for flag, first in ports.items()})
        found = serve.identities(*identity, instances, advertise_host, fixed_role=fixed_role)
        serve.serve(found, engine, models.resolve(model, weights=False, console=_errors), drain_deadline_s)
    except (ProfileError, settings.FlagError, mock_model.VocabularyError, OSError) as error:
        exit_with_error(str(error))


@app.command(context_settings=_PASS_THROUGH)
def gateway(
    context: typer.Context,
    worker: Annotated[list[str] | None, typer.Option(help="Base URL of an instance; repeat for each.")] = None,
    service_discovery: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND:WHERE",
            help="Source of instances that come and go: file:PATH, dns:HOST:PORT, srv:NAME, "
            "kubernetes:NAMESPACE/SERVICE, pods:NAMESPACE/LABELS:PORT, ray:APPLICATION, or api "
            "(docs/discovery.md); repeat for each.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder of the served model.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; variables and flags take precedence.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on.")] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that serve it together, one core each; 1 by default.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Policy preset, or its YAML file (docs/policy.md).")] = None,
    policy: Policies = None,
    settings: Settings = None,
    period_s: Annotated[float | None, typer.Option(help="Seconds between two rebalancing decisions.")] = None,
    cooldown_s: Annotated[
        float | None, typer.Option(help="Seconds for which a request that has moved does not move again.")
    ] = None,
    slo_ttft_s: Annotated[float | None, typer.Option(help="Objective for the time to first token.")] = None,
    slo_tpot_s: Annotated[float | None, typer.Option(help="Objective for the time of each further token.")] = None,
    slo_gap_s: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS|none", help="Objective for the longest gap of a stream, in seconds, or none; by default 2."
        ),
    ] = None,
    role_planner: Annotated[
        str | None,
        typer.Option(metavar="off|advise|act", help="Plan the roles of instances by their load (docs/roles.md)."),
    ] = None,
    decision_log: Annotated[Path | None, typer.Option(help="File for every decision, for `ares replay`.")] = None,
    record: Annotated[Path | None, typer.Option(help="Folder for a recording of the run, for the simulator.")] = None,
    shutdown_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds that a SIGTERM waits for requests to finish.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the keys of clients, one a line.")] = None,
    admin_key_file: Annotated[Path | None, typer.Option(help="File with the key of the admin routes.")] = None,
    control_key_file: ControlKeyFile = None,
    worker_api_key_file: Annotated[Path | None, typer.Option(help="File with the instances' own API key.")] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    access_log: Annotated[
        bool | None, typer.Option("--access-log/--no-access-log", help="Log every request when it has ended.")
    ] = None,
    otlp_traces_endpoint: OtlpTracesEndpoint = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file of the certificate chain; serves TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.")] = None,
) -> None:
    """Serve OpenAI's API over running instances.

    And these flags, as `vllm serve` has them (docs/api.md): --served-model-name, --tokenizer, --chat-template,
    --chat-template-content-format, --default-chat-template-kwargs, --trust-request-chat-template, --response-role,
    --generation-config, --override-generation-config, --max-logprobs, --return-tokens-as-token-ids,
    --enable-force-include-usage, --enable-prompt-tokens-details, --sse-keep-alive-interval, --allowed-origins,
    --allowed-methods, --allowed-headers, --allow-credentials, --disable-fastapi-docs; and those of parsers
    (docs/reasoning-and-tools.md): --reasoning-parser, --tool-call-parser, --enable-auto-tool-choice,
    --tool-strict-level, --exclude-tools-when-tool-choice-none, --reasoning-parser-plugin, --tool-parser-plugin.
    """
    from ares import config as configuration
    from ares.engine import front_end_flags
    from ares.gateway.serving import serve
    from ares.parsers.loading import load as load_parsers

    given = front_end_flags.split(context.args)
    if given.others:
        front_end_flags.check(given.others, up=True)
        exit_with_error(f"no such option: {given.others[0]} (ares gateway --help)")

    serve(
        configuration.load(
            config,
            workers=worker,
            service_discovery=service_discovery,
            model=model,
            host=host,
            port=port,
            processes=processes,
            preset=preset,
            policies=policy,
            settings=settings,
            period_s=period_s,
            cooldown_s=cooldown_s,
            slo_ttft_s=slo_ttft_s,
            slo_tpot_s=slo_tpot_s,
            slo_gap_s=slo_gap_s,
            role_planner=role_planner,
            decision_log=decision_log,
            record=record,
            shutdown_timeout_s=shutdown_timeout_s,
            api_keys=read_keys(api_key_file) if api_key_file else None,
            admin_key=read_key(admin_key_file) if admin_key_file else None,
            control_key=read_key(control_key_file) if control_key_file else None,
            worker_api_key=read_key(worker_api_key_file) if worker_api_key_file else None,
            log_format=log_format,
            log_level=log_level,
            access_log=access_log,
            otlp_traces_endpoint=otlp_traces_endpoint,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            **given.settings,
        ),
        load_parsers,
    )


@app.command(context_settings=_PASS_THROUGH)
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
    port: Annotated[int, typer.Option(help="Port of the endpoint.", min=1, max=_LAST_PORT)] = 8000,
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
            help="Checkpoint of `ares predictor train`, none, or learn (none at first, with --learn); by default the "
            "one that ships for the model."
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
