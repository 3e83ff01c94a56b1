"""All checks of a cluster, in order."""

import functools
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ares.bench.nixl_counters import BYTES, FAULTS, SECONDS, sums
from ares.check import configuration, hidden_states, instances, leftovers, stalls, transfers, transport, unmoved
from ares.check.divergence import Divergence, add
from ares.check.instances import Cluster, Found
from ares.check.rows import Outcome, Row, failed
from ares.check.steps import Steps
from ares.gateway.pool.discovery import Served
from ares.protocol.keys import ControlKey

# Token ids of prompts where the size of the vocabulary is not known: every tokenizer has so many.
_FEW_TOKENS = 256
_MANY_TOKENS = 40_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What to check, and how.

    Attributes
    ----------
    urls
        Base URLs of the instances.
    served
        The model that they must serve; None: that of the first one that answers.
    control_key, api_key
        Of the instances.
    logs
        Logs of instances by their names.
    outputs, tokens
        Outputs of each pair, and tokens of each.
    step_s, total_s
        Time limits of one check and of all.
    """

    urls: list[str]
    served: Served | None = None
    control_key: ControlKey | None = None
    api_key: str | None = None
    logs: dict[str, Path] = field(default_factory=dict)
    outputs: int = 3
    tokens: int = 64
    step_s: float = 120.0
    total_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Report:
    """The rows of all checks, and the instances that were found."""

    rows: list[Row]
    instances: list[dict[str, Any]]

    @property
    def failed(self) -> bool:
        """Whether any check has failed."""
        return failed(self.rows)


async def run(plan: Plan, note: Callable[[str], None] = lambda _: None) -> Report:
    """Run all checks; `note` is called with what begins."""
    steps = Steps(plan.step_s, plan.total_s, note)
    gateway = f"check-{uuid.uuid4().hex[:8]}"
    note("instances: whether they answer")
    async with instances.connected(plan.urls, plan.served, plan.control_key, plan.api_key, gateway) as (cluster, rows):
        steps.rows += rows
        steps.rows += configuration.rows(cluster.found)
        if cluster.found:
            await _measure(plan, cluster, steps)
        else:
            steps.rows.append(Row(transfers.GROUP, "all", Outcome.NOT_RUN, "no instance answers"))
        return Report(steps.rows, [_describe(each) for each in cluster.found])


async def _measure(plan: Plan, cluster: Cluster, steps: Steps) -> None:
    exact = configuration.exact(cluster.found)
    vocabulary = _vocabulary(cluster)
    seed = random.randbytes(8).hex()  # noqa: S311 - so that no prefix cache has the prompts; no secret
    before = await steps.run(leftovers.GROUP, "counters of NIXL", functools.partial(_counters, cluster))
    alone = []
    for each in cluster.found:
        generate = functools.partial(unmoved.generate, cluster, each, plan.tokens, vocabulary, seed)
        if (one := await steps.run(unmoved.GROUP, each.name, generate)) is not None:
            alone.append(one)
    steps.rows += unmoved.rows(alone, exact=exact)
    await _transfer(cluster, steps, transfers.Plan(plan.outputs, plan.tokens, vocabulary, exact), seed)
    if all(each.mock for each in cluster.found):
        steps.rows.append(Row(hidden_states.GROUP, "hidden states", Outcome.NOT_RUN, "mock engines have none"))
    for each in [each for each in cluster.found if not each.mock]:
        check = functools.partial(hidden_states.check, cluster, each, vocabulary, seed)
        steps.rows += await steps.run(hidden_states.GROUP, each.name, check) or []
    after = await steps.run(leftovers.GROUP, "counters of NIXL", functools.partial(_counters, cluster))
    steps.rows += transport.rows(cluster.found, plan.logs)
    if before is not None and after is not None:
        steps.rows += transport.speed(cluster.found, before, after)
        steps.rows.append(leftovers.faults(before, after))
    row = await steps.run(leftovers.GROUP, "requests of this check", functools.partial(leftovers.requests, cluster))
    steps.rows += [row] if row is not None else []


async def _transfer(cluster: Cluster, steps: Steps, plan: transfers.Plan, seed: str) -> None:
    pairs = transfers.pairs(cluster)
    if len(cluster.decode) < 2:
        why = f"{len(cluster.decode)} decode instance answers: nothing can move"
        steps.rows.append(Row(transfers.GROUP, "decode -> decode", Outcome.NOT_RUN, why))
    if not cluster.prefill:
        why = "no prefill instance answers: decode instances prefill"
        steps.rows.append(Row(transfers.GROUP, "prefill -> decode", Outcome.NOT_RUN, why))
    moves: list[transfers.Move] = []
    found: list[Divergence] = []
    for pair in pairs:
        check = functools.partial(transfers.check, cluster, pair, plan, seed)
        if (result := await steps.run(transfers.GROUP, pair.name, check)) is not None:
            row, done = result
            steps.rows.append(row)
            moves += done.moves
            found += done.divergence
    if found:
        steps.rows.append(transfers.total(add(found), exact=plan.exact))
    steps.rows += stalls.rows(moves)
    steps.rows.append(
        Row(
            stalls.GROUP,
            "cost while nothing moves",
            Outcome.NOT_RUN,
            "needs an engine without ARES for comparison",
            "ares bench overhead compares the two on one machine",
        )
    )


async def _counters(cluster: Cluster) -> dict[str, dict[str, float]]:
    names = (*FAULTS, BYTES, SECONDS)
    return {each.name: await sums(cluster.http, each.instance.url, names) for each in cluster.found}


def _vocabulary(cluster: Cluster) -> int:
    sizes = [each.description.shape.get("vocab_size", _FEW_TOKENS) for each in cluster.found]
    return min(*sizes, _MANY_TOKENS)


def _describe(found: Found) -> dict[str, Any]:
    hello = found.hello
    return {
        "name": found.name,
        "role": hello.role,
        "vllm": found.vllm,
        "mock": found.mock,
        "versions": hello.versions,
        "configuration": hello.configuration,
        "carries": hello.carries,
        "block_size": hello.block_size,
        "kv_blocks": hello.kv_blocks,
        "max_model_len": hello.max_model_len,
        "token_bytes": hello.token_bytes,
        "tensor_parallel_size": hello.peer.tp_size,
        "prefix_caching": hello.prefix_caching,
        "shape": found.description.shape,
    }
