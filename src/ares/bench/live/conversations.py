"""Conversations of several turns: chats with prompts of their own, and agents that share a long one.

A turn's prompt is that of the turn before, what was answered, and new tokens; it is sent when the answer has come and
its user, or tool, has taken its time. Prompts are token ids, so that no text is rendered or parsed: random ones, or
those of the texts in prompt files.
"""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from tokenizers import Tokenizer

from ares.bench.live.client import Observed, send_request
from ares.bench.live.load import Planned, random_prompt
from ares.models import resolve
from ares.models.cache import ModelError
from ares.predictor import prompts

_TURNS = (3, 8)
# Share of the conversations that are those of agents, and their kinds: each has a prompt that its agents share.
_AGENTS, _KINDS = 0.5, 3


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: tokens that are new in its prompt, tokens of its answer, and the seconds before it is sent."""

    new: tuple[int, ...]
    answer: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation that begins `at_s` seconds from the start with `begins`, which others may share."""

    name: str
    at_s: float
    begins: tuple[int, ...]
    turns: tuple[Turn, ...]


# What its user says in each conversation of prompt files, as tokens.
Said = Sequence[Sequence[tuple[int, ...]]]


def said_in(files: list[Path], model: str, seed: int, note: Callable[[str], None]) -> Said:
    """Return what users say in prompt files, in the tokens of a model, behind the words that name the speakers.

    Raises
    ------
    PredictorError
        A file holds no prompts.
    ModelError
        The model is not available, or has no tokenizer.json.
    """
    file = resolve.resolve(model, weights=False) / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{model} has no tokenizer.json: with --prompts, multi-turn needs one")
    tokenizer = Tokenizer.from_file(str(file))

    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(f"\nUser: {text}\nAssistant:", add_special_tokens=False).ids)

    return [[encoded(text) for text in texts] for texts in prompts.read_conversations(files, seed, note)]


def conversations(count: int, rate: float, longest: int, seed: int, said: Said = ()) -> list[Conversation]:
    """Return conversations that arrive at random.

    Parameters
    ----------
    count, rate
        How many, and how many a second.
    longest
        Tokens that the longest sequence may have; a conversation ends before it would become longer.
    seed
        Of all that is random.
    said
        What users say; nothing: random tokens. A conversation that has fewer turns than are drawn goes on with the next
        one, and agents share the beginnings of others, as examples.
    """
    generator = random.Random(seed)  # noqa: S311 - a workload, not a secret
    texts = itertools.cycle(said)
    if said:
        flat = itertools.cycle(token for texts_ in said for text in texts_ for token in text)
        shared = [tuple(itertools.islice(flat, longest // 4)) for _ in range(_KINDS)]
    else:
        shared = [tuple(random_prompt(generator, longest // 4)) for _ in range(_KINDS)]
    made, at = [], 0.0
    for number in range(count):
        at += generator.expovariate(rate)
        agent = generator.random() < _AGENTS
        begins = generator.choice(shared) if agent else () if said else tuple(random_prompt(generator, 50))
        new = (text for one in texts for text in one) if said else _random_texts(generator, agent)
        turns = _turns(generator, longest - len(begins), agent, new)
        made.append(Conversation(f"c{number}", at, begins, tuple(turns)))
    return made


def _random_texts(generator: random.Random, agent: bool) -> Iterator[tuple[int, ...]]:
    for number in itertools.count():
        size = generator.randrange(60, 300) if agent else generator.randrange(20, 200 if number else 400)
        yield tuple(random_prompt(generator, size))


def _turns(generator: random.Random, room: int, agent: bool, texts: Iterator[tuple[int, ...]]) -> list[Turn]:
    turns: list[Turn] = []
    for number in range(generator.randint(*_TURNS)):
        new = next(texts)
        answer = generator.randrange(16, 60) if agent else generator.randrange(40, 160)
        if not turns:  # of a long text, what fits
            new = new[: max(1, room - answer)]
        room -= len(new) + answer
        if room < 0 and turns:
            break
        wait_s = generator.expovariate(2.0 if agent else 0.5) if number else 0.0
        turns.append(Turn(new, answer, wait_s))
    return turns


async def converse(
    http: aiohttp.ClientSession,
    url: str,
    model: str,
    conversation: Conversation,
    start: float,
    salt: str,
    done: Callable[[], None],
) -> list[Observed]:
    """Send the turns of a conversation one after the other; a turn that fails is the last one.

    `salt` keeps the KV apart from that of other runs; `done` is called after each turn.
    """
    prompt, seen, at = list(conversation.begins), list[Observed](), conversation.at_s
    for number, turn in enumerate(conversation.turns):
        prompt += turn.new
        body = {
            "prompt": list(prompt),
            "max_tokens": turn.answer,
            "ignore_eos": True,
            "temperature": 0,
            "cache_salt": salt,
        }
        planned = Planned(f"{conversation.name}.{number}", at, body)
        one = await send_request(http, url, model, planned, start)
        done()
        seen.append(one)
        if one.error is not None:
            break
        prompt += one.tokens
        if number + 1 < len(conversation.turns):
            at = time.monotonic() - start + conversation.turns[number + 1].wait_s
    return seen


def reusable_tokens(all_of_them: list[Conversation]) -> int:
    """Return the prompt tokens that need not be computed where everything is cached once it has been computed."""
    known = set[tuple[int, ...]]()
    total = 0
    for conversation in all_of_them:
        begun = len(conversation.begins) if conversation.begins in known else 0
        known.add(conversation.begins)
        length = len(conversation.begins)
        for number, turn in enumerate(conversation.turns):
            total += length if number else begun
            length += len(turn.new) + turn.answer
    return total
