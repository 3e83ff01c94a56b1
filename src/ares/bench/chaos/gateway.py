"""`python -m ares.bench.chaos.gateway gateway ...`: a gateway whose controller throws.

It is `ares gateway` with every decision of the policy replaced by one that raises now and then. The product has no
such switch: the chaos suite starts this in its place. It serves loopback only.
"""

import argparse
import random
import sys
from collections.abc import Callable
from typing import Any

from ares import cli
from ares.bench.chaos.check import INJECTED
from ares.config import ConfigError, GatewayConfig
from ares.gateway import controller, server
from ares.policy.entrance import Entrance

_LOOPBACK = ("127.0.0.1", "::1")


class InjectedError(RuntimeError):
    """Thrown instead of a decision."""


def throwing(decide: Callable[..., Any], draw: random.Random, share: float) -> Callable[..., Any]:
    """Return `decide` with this share of its calls failing."""

    def thrown(*arguments: Any, **options: Any) -> Any:
        if draw.random() < share:
            raise InjectedError(INJECTED)
        return decide(*arguments, **options)

    return thrown


def install(seed: int, share: float) -> None:
    """Let this share of the decisions fail, from now on and in this process."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    # Where the controller looks them up: its own module.
    names = vars(controller)
    dispatcher, rebalancer = names["dispatcher"], names["rebalancer"]
    names["dispatcher"] = lambda name: throwing(dispatcher(name), draw, share)
    names["rebalancer"] = lambda name: throwing(rebalancer(name), draw, share)
    names["rescue"] = throwing(names["rescue"], draw, share)
    Entrance.decide = throwing(Entrance.decide, draw, share)  # type: ignore[method-assign]


def main() -> None:
    """Run the command `gateway`; two flags more say which decisions fail."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--fault-seed", type=int, default=0)
    parser.add_argument("--fault-share", type=float, default=0.05)
    given, sys.argv[1:] = parser.parse_known_args()
    serve = server.serve

    def guarded(config: GatewayConfig) -> None:
        if config.host not in _LOOPBACK:
            raise ConfigError(f"a gateway that fails on purpose serves loopback only, not {config.host}")
        serve(config)

    install(given.fault_seed, given.fault_share)
    server.serve = guarded
    cli.main()


if __name__ == "__main__":
    main()
