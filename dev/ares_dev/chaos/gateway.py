"""`python -m ares_dev.chaos.gateway gateway ...`: a gateway with injected failures of decisions and telemetry.

It is `ares gateway` with every decision of the policy replaced by one that raises now and then, and with instances
whose telemetry is changed on command (telemetry_faults.py). The package has no such switches: the chaos suite starts
this instead. It serves loopback only.
"""

import argparse
import contextlib
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ares.cli import main as cli
from ares.config import ConfigError, GatewayConfig
from ares.gateway import serving
from ares.gateway.control import controller, rebalancing, role_planner
from ares.gateway.records.decision_log import DecisionLog
from ares.gateway.service import Gateway
from ares_dev.chaos import telemetry_faults
from ares_dev.chaos.invariants import INJECTED

_LOOPBACK = ("127.0.0.1", "::1")


class InjectedError(RuntimeError):
    """Raised instead of a decision."""


def failing(decide: Callable[..., Any], draw: random.Random, share: float) -> Callable[..., Any]:
    """Return `decide` with this share of its calls failing."""

    def raising(*arguments: Any, **options: Any) -> Any:
        if draw.random() < share:
            raise InjectedError(INJECTED)
        return decide(*arguments, **options)

    return raising


def install(seed: int, share: float) -> None:
    """Let this share of the decisions fail, from now on and in this process."""
    # A generator for each kind: whether the third dispatch fails does not depend on how many moves came before.
    kinds = ("prefill", "dispatch", "moves", "oom_avoidance", "admission", "copies", "roles")
    draws = {kind: random.Random(f"{seed} {kind}") for kind in kinds}  # noqa: S311 - no secret

    def faulty(make: Callable[..., Any], method: str, draw: random.Random) -> Callable[..., Any]:
        def made(*policy: Any) -> Any:
            one = make(*policy)
            setattr(one, method, failing(getattr(one, method), draw, share))
            return one

        return made

    # Where they are looked up: in the modules that use them.
    for module, maker, method, kind in (
        (controller, "prefill_policy", "choose", "prefill"),
        (controller, "dispatcher", "choose", "dispatch"),
        (controller, "admission_policy", "decide", "admission"),
        (rebalancing, "rebalancer", "decide", "moves"),
        (controller, "copier", "decide", "copies"),
        (role_planner, "role_policy", "plan", "roles"),
    ):
        vars(module)[maker] = faulty(vars(module)[maker], method, draws[kind])
    vars(rebalancing)["avoid_oom"] = failing(vars(rebalancing)["avoid_oom"], draws["oom_avoidance"], share)


def log_one_of(log: DecisionLog, every: int) -> None:
    """Log only one decision out of several: each is logged with all of its inputs.

    Those that decide something and those that do not are counted separately, so that the few are not lost.
    """
    seen: Counter[tuple[str, bool]] = Counter()

    def keeps(kind: str, decides: bool) -> bool:
        seen[kind, decides] += 1
        return seen[kind, decides] % every == 1 % every

    log.keeps = keeps


def main() -> None:
    """Run the command `gateway`; three flags more say which decisions fail, and how many are logged."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--fault-seed", type=int, default=0)
    parser.add_argument("--fault-share", type=float, default=0.05)
    parser.add_argument("--log-every", type=int, default=1)
    given, sys.argv[1:] = parser.parse_known_args()
    names = vars(serving)
    serve, build = names["serve"], names["build"]
    injector = telemetry_faults.TelemetryFaultInjector()

    def serve_on_loopback(config: GatewayConfig, *arguments: Any) -> None:
        if config.host not in _LOOPBACK:
            raise ConfigError(f"a gateway that fails on purpose serves loopback only, not {config.host}")
        serve(config, *arguments)

    def build_with_faults(config: GatewayConfig, folder: Path, **options: Any) -> FastAPI:
        app: FastAPI = build(config, folder, **options)
        telemetry_faults.add_route(app, injector)
        lifespan = app.router.lifespan_context

        @contextlib.asynccontextmanager
        async def with_faults(app: FastAPI) -> AsyncIterator[Any]:
            async with lifespan(app) as state:  # only a gateway that has started has a pool and a log
                gateway: Gateway = app.state.gateway
                telemetry_faults.install(injector, gateway.pool)
                log_one_of(gateway.controller.log, given.log_every)
                yield state

        app.router.lifespan_context = with_faults
        return app

    install(given.fault_seed, given.fault_share)
    names["serve"], names["build"] = serve_on_loopback, build_with_faults
    cli.main()


if __name__ == "__main__":
    main()
