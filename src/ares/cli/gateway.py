"""`ares gateway`: OpenAI's API over running instances."""

from pathlib import Path
from typing import Annotated

import typer

from ares.cli.options import ControlKeyFile, LogFormat, LogLevel, OtlpTracesEndpoint, Policies, Settings
from ares.protocol.keys import read_key, read_keys
from ares.terminal.errors import exit_with_error


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
        Path | None,
        typer.Option(
            help="YAML file of settings; deploy/gateway.yaml has all of them. Variables and flags take precedence."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on; 8000 by default.")] = None,
    processes: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that serve it together, one core each; 1 by default.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Policy preset, or its YAML file (docs/policy.md); ares by default.")
    ] = None,
    policy: Policies = None,
    settings: Settings = None,
    period_s: Annotated[
        float | None, typer.Option(help="Seconds between two rebalancing decisions; 0.5 by default.")
    ] = None,
    cooldown_s: Annotated[
        float | None, typer.Option(help="Seconds for which a request that has moved does not move again; 3 by default.")
    ] = None,
    slo_ttft_s: Annotated[
        float | None, typer.Option(help="Objective for the time to first token; 20 by default.")
    ] = None,
    slo_tpot_s: Annotated[
        float | None,
        typer.Option(
            help="Objective for the time of each further token; by default 1.5 times a step with full memory."
        ),
    ] = None,
    slo_gap_s: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS|none", help="Objective for the longest gap of a stream, in seconds, or none; by default 2."
        ),
    ] = None,
    role_planner: Annotated[
        str | None,
        typer.Option(
            metavar="off|advise|act", help="Plan the roles of instances by their load (docs/roles.md); off by default."
        ),
    ] = None,
    decision_log: Annotated[Path | None, typer.Option(help="File for every decision, for `ares replay`.")] = None,
    record: Annotated[Path | None, typer.Option(help="Folder for a recording of the run, for the simulator.")] = None,
    shutdown_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds that a SIGTERM waits for requests to finish; 30 by default.")
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
