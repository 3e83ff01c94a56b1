"""Prompts whose answer's length is knowable: from the text before the first token, and from the progress after it.

Whether a model follows an instruction is for the model to show: every prompt comes with the answer it asks for, and
`follows` says how near an output's length comes to it. docs/predictor.md has the kinds that the default model follows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_ADJECTIVES = [
    "red",
    "old",
    "small",
    "quiet",
    "brave",
    "happy",
    "tall",
    "green",
    "clever",
    "tired",
    "young",
    "silver",
    "hungry",
    "gentle",
    "wild",
]
_NOUNS = [
    "fox",
    "teacher",
    "river",
    "cat",
    "farmer",
    "train",
    "child",
    "dog",
    "ship",
    "bird",
    "king",
    "garden",
    "doctor",
    "horse",
    "baker",
]
_VERBS = ["walked", "jumped", "waited", "slept", "sang", "worked", "played", "stood", "ran", "rested"]
_PLACES = [
    "near the old bridge",
    "in the garden",
    "by the river",
    "under a tall tree",
    "behind the house",
    "at the market",
    "on the hill",
    "in the morning",
    "after the rain",
    "with a friend",
]
_THINGS = [
    "animals",
    "fruits",
    "countries",
    "colors",
    "sports",
    "jobs",
    "kinds of food",
    "things in a kitchen",
    "cities",
    "books",
]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, and the answer it asks for."""

    kind: str
    prompt: str
    answer: str


def _sentences(generator: random.Random, count: int) -> list[str]:
    return [
        f"The {generator.choice(_ADJECTIVES)} {generator.choice(_NOUNS)} {generator.choice(_VERBS)} "
        f"{generator.choice(_PLACES)}."
        for _ in range(count)
    ]


def _count(generator: random.Random) -> tuple[str, str]:
    last = generator.randint(3, 60)
    return f"Count from 1 to {last}, separated by commas.", ", ".join(str(n) for n in range(1, last + 1))


def _count_from(generator: random.Random) -> tuple[str, str]:
    first = generator.randint(1, 40)
    last = first + generator.randint(3, 40)
    return (
        f"Count as here.\n\nFrom 3 to 7: 3, 4, 5, 6, 7\nFrom 11 to 14: 11, 12, 13, 14\n\nFrom {first} to {last}:",
        ", ".join(str(n) for n in range(first, last + 1)),
    )


def _countdown(generator: random.Random) -> tuple[str, str]:
    first = generator.randint(5, 50)
    return f"Count down from {first} to 1, separated by commas.", ", ".join(str(n) for n in range(first, 0, -1))


def _alphabet(generator: random.Random) -> tuple[str, str]:
    letters = _LETTERS[: generator.randint(4, 26)]
    return f"Write the letters of the alphabet from A to {letters[-1]}, separated by spaces.", " ".join(letters)


def _copy(generator: random.Random) -> tuple[str, str]:
    text = " ".join(_sentences(generator, generator.randint(1, 10)))
    return f"Repeat this text exactly:\n\n{text}", text


def _copy_example(generator: random.Random) -> tuple[str, str]:
    text = " ".join(_sentences(generator, generator.randint(1, 10)))
    example = " ".join(_sentences(generator, 2))
    return f"Copy the text.\n\nText: {example}\nCopy: {example}\n\nText: {text}\nCopy:", text


def _enumerate(generator: random.Random) -> tuple[str, str]:
    sentences = _sentences(generator, generator.randint(2, 12))
    return (
        "Write these sentences as a numbered list:\n\n" + "\n".join(sentences),
        "\n".join(f"{n}. {sentence}" for n, sentence in enumerate(sentences, 1)),
    )


def _list(generator: random.Random) -> tuple[str, str]:
    things, count = generator.choice(_THINGS), generator.randint(3, 25)
    return (
        f"List {count} {things}, numbered from 1 to {count}. Write only the list.",
        "\n".join(f"{n}. {generator.choice(_NOUNS)}" for n in range(1, count + 1)),
    )


def _table(generator: random.Random) -> tuple[str, str]:
    factor, last = generator.randint(2, 12), generator.randint(3, 20)
    return (
        (
            f"Write the multiplication table of {factor}, as in this example for 3 up to 4:\n\n"
            f"3 x 1 = 3\n3 x 2 = 6\n3 x 3 = 9\n3 x 4 = 12\n\nNow for {factor} up to {last}:"
        ),
        "\n".join(f"{factor} x {n} = {factor * n}" for n in range(1, last + 1)),
    )


def _sum(generator: random.Random) -> tuple[str, str]:
    terms = [generator.randint(1, 9) for _ in range(generator.randint(3, 12))]
    total, lines = terms[0], []
    for term in terms[1:]:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return (
        f"Add the numbers step by step.\n\n2, 5, 1:\n2 + 5 = 7\n7 + 1 = 8\n\n{', '.join(map(str, terms))}:",
        "\n".join(lines),
    )


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "count": _count,
    "count_from": _count_from,
    "countdown": _countdown,
    "alphabet": _alphabet,
    "copy": _copy,
    "copy_example": _copy_example,
    "enumerate": _enumerate,
    "list": _list,
    "table": _table,
    "sum": _sum,
}


# What SmolLM2-135M-Instruct follows in about half of the cases or more (docs/predictor.md has the table); the others
# stay for models that can count.
FOLLOWED = ("copy", "copy_example", "enumerate", "list")


def generate(count: int, kinds: Sequence[str] = FOLLOWED, seed: int = 0) -> list[Task]:
    """Return so many different tasks, the kinds in turn; fewer where there are not so many.

    Raises
    ------
    KeyError
        There is no such kind.
    """
    generator = random.Random(seed)  # noqa: S311 - a data set, not a secret
    tasks: dict[str, Task] = {}
    # Some kinds have few different prompts: give up on a kind's turn rather than wait for a new one for ever.
    for turn in range(20 * count):
        kind = kinds[turn % len(kinds)]
        prompt, answer = KINDS[kind](generator)
        tasks.setdefault(prompt, Task(kind, prompt, answer))
        if len(tasks) == count:
            break
    return list(tasks.values())


def follows(answer_tokens: int, output_tokens: int) -> bool:
    """Whether an output is as long as the answer that was asked for, within 15 % or five tokens."""
    return abs(output_tokens - answer_tokens) <= max(5, 0.15 * answer_tokens)
