"""`ares worker`: one vLLM instance, or one mock engine."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ares import published_address
from ares.bench.options import Model
from ares.cli import instance_flags
from ares.cli.options import LAST_PORT, AllowUnsupportedVllm, ControlKeyFile, Simulate
from ares.engine.defaults import DEFAULT_DRAIN_S, DEFAULT_PULL_BYTES
from ares.models.resolve import DEFAULT_MODEL
from ares.protocol.fields import CONTROL_KEY_VARIABLE
from ares.protocol.keys import read_key, refuse_key_flag
from ares.terminal.errors import exit_with_error


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
    port: Annotated[int, typer.Option(help="HTTP port.", max=LAST_PORT, min=0)] = 8100,
    control_port: Annotated[
        int, typer.Option(help="Port of the control channel; 0 takes a free one.", max=LAST_PORT, min=0)
    ] = 0,
    nixl_port: Annotated[
        int, typer.Option(help="Port of NIXL's side channel; 0 takes a free one.", max=LAST_PORT, min=0)
    ] = 0,
    cores: Annotated[str | None, typer.Option(help="CPU builds: cores for the model, such as 0-3.")] = None,
    pull_within_step_bytes: Annotated[
        int, typer.Option(min=0, help="Largest KV pull within a scheduling step (docs/migration.md); 0 turns it off.")
    ] = DEFAULT_PULL_BYTES,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint of `ares predictor train`; none; or learn: begin without one and take those of a learner, "
            "as with --learn. By default the one that ships for the model."
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
            help="Record some requests for a learner, and take its predictors (docs/learning.md).",
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
        serve.serve(found, engine, models.resolve(model, weights=False, console=Console(stderr=True)), drain_deadline_s)
    except (ProfileError, settings.FlagError, mock_model.VocabularyError, OSError) as error:
        exit_with_error(str(error))
