"""The hidden-state hook against states that are computed again, and what the predictor costs a step.

An instance that runs a predictor reads the last hidden state of each request in every step. Here the state after a
generated token is compared with the state at the end of a prompt of the same tokens. That needs the worker's own
methods, which vLLM offers over HTTP in its development mode only (``VLLM_SERVER_DEV_MODE=1``).
"""

import math
import random
from collections.abc import Sequence

import aiohttp
import msgspec

from ares.check.generation import generate, new_prompt
from ares.check.instances import Cluster, Found
from ares.check.rows import Outcome, Row
from ares.protocol.fields import RECORDED_STATES_METHOD

GROUP = "predictor"
PROMPT_TOKENS, _TOKENS = 24, 12
# After so many output tokens a state is computed again.
_CHECKED = (5, 11)
# A state that is computed again differs by rounding, which must be far less than states of neighbours differ.
_TOLERANCE = 0.2
_CALL_TIMEOUT_S = 20.0
_HOW = "start it with VLLM_SERVER_DEV_MODE=1, within a network that you trust, to check this"


class States(msgspec.Struct):
    """What a worker has recorded: states by the number of tokens before them, and the predictor's time in steps."""

    states: dict[str, list[float]] = {}
    steps: int = 0
    predictor_s: float = 0.0


class _Reply(msgspec.Struct):
    results: list[States | None] = []


async def check(cluster: Cluster, found: Found, vocabulary: int, seed: str) -> list[Row]:
    """Compare, and time the predictor."""
    if found.hello.configuration.get("predictor") != "on":
        return [Row(GROUP, found.name, Outcome.NOT_RUN, "the instance runs no predictor")]
    if found.hello.configuration.get("development_mode") != "on":
        return [Row(GROUP, found.name, Outcome.NOT_RUN, "the instance does not offer its workers' methods", _HOW)]
    if await _record(cluster, found, "on") is None:
        return [Row(GROUP, found.name, Outcome.FAIL, "its workers refuse to record", "see its log")]
    generator = random.Random(f"{seed} states {found.name}")  # noqa: S311 - a workload, not a secret
    prompt = new_prompt(generator, PROMPT_TOKENS, vocabulary)
    output = await generate(prompt, _TOKENS, found.instance, gateway=cluster.gateway)
    recorded = await _record(cluster, found, "take")
    again: dict[int, list[float] | None] = {}
    for count in _CHECKED:
        await generate(prompt + output[:count], 1, found.instance, gateway=cluster.gateway)
        states = await _record(cluster, found, "take")
        again |= {count: states.states.get(str(PROMPT_TOKENS + count)) if states else None}
    await _record(cluster, found, "off")
    if recorded is None:
        return [Row(GROUP, found.name, Outcome.FAIL, "the worker has recorded nothing")]
    return [compared(found, recorded.states, again), cost(found, recorded)]


def compared(found: Found, states: dict[str, list[float]], again: dict[int, list[float] | None]) -> Row:
    """Return whether states are those that are computed again.

    Parameters
    ----------
    states
        Those of one output, by the number of tokens before each.
    again
        The same ones, computed as the last state of a prompt, by the number of output tokens in it.
    """
    check = f"hidden states, {found.name}"
    errors = []
    for count, other in again.items():
        length = PROMPT_TOKENS + count
        one, before = states.get(str(length)), states.get(str(length - 1))
        if one is None or before is None or other is None:
            value = f"no state after {count} output tokens: the hook has missed that step"
            return Row(GROUP, check, Outcome.FAIL, value, "predictions are wrong then: --predictor none")
        errors.append(_distance(one, other) / max(_distance(one, before), 1e-12))
    value = f"computed again they differ by {max(errors):.2g} of the distance of two neighbours"
    figures = {"errors": errors}
    if max(errors) > _TOLERANCE:
        return Row(GROUP, check, Outcome.FAIL, value, "predictions are wrong then: --predictor none", figures)
    return Row(GROUP, check, Outcome.PASS, value, figures=figures)


def cost(found: Found, recorded: States) -> Row:
    """Return the predictor's time in a step."""
    check = f"time of a step, {found.name}"
    if not recorded.steps or not recorded.predictor_s:
        return Row(GROUP, check, Outcome.NOT_RUN, "the instance runs no predictor")
    each_us = 1e6 * recorded.predictor_s / recorded.steps
    figures = {"steps": recorded.steps, "predictor_us": each_us}
    return Row(GROUP, check, Outcome.PASS, f"{each_us:.0f} us of a step, one request", figures=figures)


async def _record(cluster: Cluster, found: Found, state: str) -> States | None:
    """Let the worker record (`on`), or stop (`off`), or return what it has recorded (`take`); None where it cannot."""
    body = {"method": RECORDED_STATES_METHOD, "args": [state, cluster.gateway]}
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    async with cluster.http.post(f"{found.instance.url}/collective_rpc", json=body, timeout=timeout) as reply:
        if reply.status != 200:
            return None
        results = msgspec.json.decode(await reply.read(), type=_Reply).results
    return next((each for each in results if each is not None), None)


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return math.dist(one, other) / max(math.hypot(*one), 1e-12)
