"""KV between every pair of instances: it is transferred, and the tokens after it are compared with a reference.

A prefill instance hands a prompt's KV to a decode instance; a decode instance hands a running output to another one.
The reference is the same output by an instance that computes everything itself and has no KV of the transfer in its
prefix cache. Each prompt is new, so that the whole of it is transferred.
"""

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

from ares.check.divergence import Divergence, add
from ares.check.generation import HANDOVER_TIMEOUT_S, Generation, first_difference, generate, new_prompt
from ares.check.instances import Cluster, Found
from ares.check.rows import Outcome, Row
from ares.gateway.pool.delta import EngineLostError
from ares.gateway.session import precopy
from ares.gateway.session.handover import MigrationRecord
from ares.policy.transfer import PRE_COPY, STOP_AND_COPY, Mode

GROUP = "KV transfers"
# How long a report of a pull may trail the first token.
_REPORT_LAG_S = 5.0
# Output tokens before a move: enough for the gaps of an undisturbed output.
BEFORE_MOVE = 12
_MIB = 1 << 20
_WRONG_TOKENS = (
    "KV does not arrive as it was sent, or the two instances compute differently: see `tokens without a transfer`; "
    "do not move requests between them, and report it with the --json file"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two instances: `target` pulls KV from `source`."""

    source: Found
    target: Found

    @property
    def name(self) -> str:
        """How rows call it."""
        return f"{self.source.name} -> {self.target.name}"

    @property
    def is_move(self) -> bool:
        """Whether it transfers a running output."""
        return self.source.hello.role != "prefill"


@dataclass(frozen=True, slots=True)
class Move:
    """What one move of a running output took: `stall_s` in the client's stream, its median `gap_s` before."""

    mode: Mode
    stall_s: float
    gap_s: float


@dataclass(slots=True)
class Transferred:
    """The transfers of one pair.

    Attributes
    ----------
    tokens
        Whose KV the target has pulled.
    moves
        What each took.
    divergence
        Of the outputs from their references.
    """

    tokens: int = 0
    moves: list[Move] = field(default_factory=list)
    divergence: list[Divergence] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """How each pair is checked.

    Attributes
    ----------
    outputs
        Outputs of a pair; those that move alternate between the two modes of a move.
    tokens
        Tokens of each output.
    vocabulary
        Number of token ids that prompts may have.
    exact
        Whether every token must be equal; if not, each reference is generated twice, as the control.
    """

    outputs: int
    tokens: int
    vocabulary: int
    exact: bool


class TransferError(Exception):
    """A transfer did not happen; the message says what happened instead."""


class TooShortError(Exception):
    """The output ended before it could be moved: nothing is known of the pair."""


def pairs(cluster: Cluster) -> list[Pair]:
    """Return all pairs, those first that bring every instance in once."""
    decode = cluster.decode
    from_prefill = [
        Pair(cluster.prefill[(n + shift) % len(cluster.prefill)], target)
        for shift in range(len(cluster.prefill))
        for n, target in enumerate(decode)
    ]
    between = [
        Pair(source, decode[(n + shift) % len(decode)])
        for shift in range(1, len(decode))
        for n, source in enumerate(decode)
    ]
    return from_prefill + between


def prompt_tokens(pair: Pair, number: int) -> int:
    """Return the length of the prompt of a pair's output: two blocks and a part of a third, another one each time."""
    size = max(each.hello.block_size for each in (pair.source, pair.target))
    longest = min(each.hello.max_model_len for each in (pair.source, pair.target))
    # The output must fit as well.
    return max(2, min(2 * size + (number * size) // 3 + 1, longest // 2))


async def check(cluster: Cluster, pair: Pair, plan: Plan, seed: str) -> tuple[Row, Transferred]:
    """Transfer KV over a pair, and compare.

    Raises
    ------
    EngineLostError, EngineRefusedError, NoInstanceError, HandoverError, NotMovableError
        An instance failed.
    """
    done = Transferred()
    generator = random.Random(f"{seed} {pair.name}")  # noqa: S311 - a workload, not a secret
    try:
        for number in range(plan.outputs):
            prompt = new_prompt(generator, prompt_tokens(pair, number), plan.vocabulary)
            if pair.is_move:
                mode: Mode = PRE_COPY if number % 2 and pair.target.hello.prefix_caching else STOP_AND_COPY
                output = await _moved(cluster, pair, prompt, plan, mode, generator, done)
            else:
                output = await _prefilled(cluster, pair, prompt, plan, done)
            done.divergence.append(await _compare(cluster, pair, prompt, output, plan))
    except TransferError as error:
        return Row(GROUP, pair.name, Outcome.FAIL, str(error), _advice(pair)), done
    except TooShortError as error:
        return Row(GROUP, pair.name, Outcome.NOT_RUN, str(error), "give more --tokens"), done
    return _row(pair, plan, done), done


async def _prefilled(cluster: Cluster, pair: Pair, prompt: list[int], plan: Plan, done: Transferred) -> list[int]:
    source, target = pair.source.instance, pair.target.instance
    async with Generation(prompt, plan.tokens, target, source, gateway=cluster.gateway) as running:
        await running.reach(2)
        key = running.session.key
        received = await target.control.until_kv_received(key, _REPORT_LAG_S) if key is not None else None
        output = await running.finish()
    if received is None or received.failed or not received.pulled:
        raise TransferError("the target computed the prompt itself: it pulled no KV")
    done.tokens += received.pulled
    return output


async def _moved(
    cluster: Cluster,
    pair: Pair,
    prompt: list[int],
    plan: Plan,
    mode: Mode,
    generator: random.Random,
    done: Transferred,
) -> list[int]:
    source, target = pair.source.instance, pair.target.instance
    async with Generation(prompt, plan.tokens, source, gateway=cluster.gateway) as running:
        await running.reach(BEFORE_MOVE + generator.randrange(plan.tokens // 4))
        before = len(running.times)
        record = await precopy.migrate(running.session, target, "ares check", mode, HANDOVER_TIMEOUT_S)
        output = await running.finish()
    gaps = sorted(running.gaps()[: before - 2])
    _check_move(record)
    assert record.stall_s is not None  # noqa: S101 - for the type checker: it has moved
    done.tokens += (record.pulled_tokens or 0) + record.precopied_tokens
    done.moves.append(Move(mode, record.stall_s, gaps[len(gaps) // 2]))
    return output


def _check_move(record: MigrationRecord) -> None:
    """Raise TransferError where a move did not succeed, or its target computed the KV itself; TooShortError."""
    match record.outcome:
        case "moved":
            if not (record.pulled_tokens or record.precopied_tokens):
                raise TransferError("the output moved, but the target computed its KV itself: it pulled none")
        case "finished_first":
            raise TooShortError("an output was complete before it could be moved")
        case outcome:
            raise TransferError(f"a move ended as {outcome!r} ({record.mode}) instead of moved")


async def _compare(cluster: Cluster, pair: Pair, prompt: list[int], output: list[int], plan: Plan) -> Divergence:
    elsewhere = next((each for each in cluster.decode if each not in (pair.source, pair.target)), pair.source)
    clean = (pair.source if pair.is_move else elsewhere).instance
    reference = await generate(prompt, plan.tokens, clean, gateway=cluster.gateway)
    first = first_difference(output, reference)
    if plan.exact:
        return Divergence(1, first is not None, first=first)
    control = await generate(prompt, plan.tokens, clean, gateway=cluster.gateway)
    return Divergence(1, first is not None, 1, control != reference, first)


def _row(pair: Pair, plan: Plan, done: Transferred) -> Row:
    size = done.tokens * pair.target.hello.token_bytes
    found = add(done.divergence)
    what = "outputs moved" if pair.is_move else "prompts"
    amount = f"{size / _MIB:.1f} MiB" if size else f"KV of {done.tokens} tokens"
    value = f"{found.outputs} {what}, {amount}; {found.text()}"
    figures: dict[str, Any] = {
        "transferred_tokens": done.tokens,
        "bytes": size,
        "outputs": found.outputs,
        "different": found.different,
    }
    figures |= {"control": found.control, "control_different": found.control_different, "first_difference": found.first}
    if not found.different:
        return Row(GROUP, pair.name, Outcome.PASS, value, figures=figures)
    if plan.exact or found.significant:
        return Row(GROUP, pair.name, Outcome.FAIL, value, _WRONG_TOKENS, figures)
    return Row(GROUP, pair.name, Outcome.PASS, value, "see the sum over all pairs", figures)


def total(found: Divergence, *, exact: bool) -> Row:
    """Return the sum over all pairs: where tokens may differ by chance, no single pair shows that they do not."""
    check = "all pairs"
    figures: dict[str, Any] = {"outputs": found.outputs, "different": found.different, "by_chance": found.by_chance}
    figures |= {"control": found.control, "control_different": found.control_different}
    if exact:
        outcome = Outcome.FAIL if found.different else Outcome.PASS
        how = "every token must be equal"
        return Row(GROUP, check, outcome, f"{found.outputs} outputs, {found.text()} ({how})", figures=figures)
    value = f"{found.outputs} outputs, {found.text()}"
    if found.significant:
        return Row(GROUP, check, Outcome.FAIL, value, _WRONG_TOKENS, figures)
    if found.different > found.control_different:
        advice = "could be chance (rounding): --dtype float32 (to check, not to serve) shows whether it is"
        return Row(GROUP, check, Outcome.WARN, value, advice, figures)
    return Row(GROUP, check, Outcome.PASS, value, figures=figures)


def _advice(pair: Pair) -> str:
    address = f"{pair.source.hello.peer.host}:{pair.source.hello.peer.port}"
    return f"see the log of {pair.target.name} for NIXL's error, and whether it reaches {address} (NIXL side channel)"


async def settled(cluster: Cluster, timeout_s: float) -> list[str]:
    """Wait until no instance has anything of ours; return the names of those that still have at the end."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        busy = [each.name for each in cluster.found if _has_ours(each, cluster.gateway)]
        if not busy or loop.time() > deadline:
            return busy
        await asyncio.sleep(0.1)


def _has_ours(found: Found, gateway: str) -> bool:
    load = found.instance.state.telemetry
    if load is None:
        raise EngineLostError(f"{found.name} reports nothing any more")
    return any(row.key.startswith(f"{gateway}/") for row in load.rows)
