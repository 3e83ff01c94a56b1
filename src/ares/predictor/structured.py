"""Prompts that determine the length of their answer: known from the prompt, and ever better while it is generated.

A model may not follow an instruction: every prompt comes with the answer it asks for, and `follows` checks whether an
output's length is close to that of the answer. docs/predictor.md has the kinds that the default model follows.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def _words(text: str, between: str | None = None) -> list[str]:
    return [word.strip() for word in text.split(between)]


_ADJECTIVES = _words(
    "red old small quiet brave happy tall green clever tired young silver hungry gentle wild blue heavy narrow famous "
    "broken empty warm frozen golden lonely proud curious rusty wooden bright dusty strange polite careful noisy round "
    "yellow ancient modern tiny"
)
_NOUNS = _words(
    "fox teacher river cat farmer train child dog ship bird king garden doctor horse baker lamp bridge letter piano "
    "window forest soldier wagon painter turtle island castle bottle market singer ladder kitchen mirror engine pilot "
    "basket spider tunnel queen hammer"
)
_VERBS = _words(
    "walked jumped waited slept sang worked played stood ran rested arrived vanished laughed fell whispered returned "
    "stopped danced moved shouted"
)
_DEEDS = _words(
    "bought a new coat, lost the keys, wrote a long letter, painted the door, cooked some soup, read the newspaper, "
    "repaired the bicycle, sold the house, planted an apple tree, called the police, found an old coin, opened the "
    "box, missed the last bus, learned to swim, visited an uncle, counted the sheep, drank a cup of tea, cleaned the "
    "windows, forgot the answer, told a funny story",
    ",",
)
_PLACES = _words(
    "near the old bridge, in the garden, by the river, under a tall tree, behind the house, at the market, on the "
    "hill, after the rain, with a friend, in front of the school, next to the station, without a sound, across the "
    "street, above the clouds, far from home, inside the museum, beside the fire, along the beach, outside the city, "
    "between two mountains",
    ",",
)
_THINGS = _words("animals,fruits,countries,colors,sports,jobs,kinds of food,things in a kitchen,cities,books", ",")
_NAMES = _words("Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olivia Paul Rosa Sam")
_CITIES = _words("London Paris Rome Berlin Madrid Oslo Vienna Cairo Tokyo Lima Boston Delhi")


# Most sentences of a text: a small model does not copy longer ones reliably.
_SENTENCES = 10


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt, and the answer it asks for."""

    kind: str
    prompt: str
    answer: str


Question = tuple[str, str]
Kind = Callable[[random.Random], Question]


# --- parts of answers ---


def _sentence(generator: random.Random) -> str:
    # All begin with "The": a small model skips a first sentence that begins differently.
    pick = generator.choice
    match generator.randrange(3):
        case 0:
            return f"The {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_VERBS)} {pick(_PLACES)}."
        case 1:
            return f"The {pick(_NOUNS)} from {pick(_CITIES)} {pick(_DEEDS)}."
        case _:
            return f"The {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_DEEDS)} {pick(_PLACES)}."


def _turn(generator: random.Random) -> str:
    return f"{generator.choice(_NAMES)}: {_sentence(generator)}"


def _pair(generator: random.Random) -> str:
    return f"{generator.choice(_ADJECTIVES)} {generator.choice(_NOUNS)}: {generator.randint(1, 99)}"


def _record(generator: random.Random, between: str = ",") -> str:
    fields = (generator.choice(_NAMES), str(generator.randint(18, 80)), generator.choice(_CITIES))
    return between.join(fields)


def _statement(generator: random.Random) -> str:
    return f"{generator.choice(_NOUNS)} = {generator.choice(_VERBS)}({generator.randint(1, 99)})"


def _lines(generator: random.Random, one: Callable[[random.Random], str], most: int) -> list[str]:
    return [one(generator) for _ in range(generator.randint(2, most))]


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1))


def _dashed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# --- copies ---


def _copying(instruction: str, one: Callable[[random.Random], str], most: int, between: str = "\n") -> Kind:
    """Return a kind that asks for the unchanged text."""

    def make(generator: random.Random) -> Question:
        text = between.join(_lines(generator, one, most))
        return f"{instruction}\n\n{text}", text

    return make


def _copy_example(generator: random.Random) -> Question:
    text = _text(generator)
    example = f"{_sentence(generator)} {_sentence(generator)}"
    return f"Copy the text.\n\nText: {example}\nCopy: {example}\n\nText: {text}\nCopy:", text


def _text(generator: random.Random) -> str:
    return " ".join(_lines(generator, _sentence, _SENTENCES))


def _copy_above(generator: random.Random) -> Question:
    text = _text(generator)
    return f"{text}\n\nRepeat the text above exactly.", text


def _copy_quoted(generator: random.Random) -> Question:
    text = f'"{_text(generator)}"'
    return f"Copy this quote exactly:\n\n{text}", text


def _copy_story(generator: random.Random) -> Question:
    paragraphs = [" ".join(_lines(generator, _sentence, 3)) for _ in range(generator.randint(1, 4))]
    text = "\n\n".join(paragraphs)
    return f"Repeat this story exactly:\n\n{text}", text


def _copy_words(generator: random.Random) -> Question:
    text = ", ".join(generator.sample(_NOUNS + _ADJECTIVES, generator.randint(3, 30)))
    return f"Repeat these words exactly:\n\n{text}", text


def _copy_numbered(generator: random.Random) -> Question:
    text = _numbered(_lines(generator, _sentence, _SENTENCES))
    return f"Repeat this list exactly:\n\n{text}", text


def _copy_code(generator: random.Random) -> Question:
    text = "```python\n" + "\n".join(_lines(generator, _statement, 12)) + "\n```"
    return f"Repeat this code exactly:\n\n{text}", text


def _copy_table(generator: random.Random) -> Question:
    rows = ["| name | age | city |", "| --- | --- | --- |"]
    rows += [f"| {_record(generator, ' | ')} |" for _ in range(generator.randint(2, 10))]
    text = "\n".join(rows)
    return f"Repeat this table exactly:\n\n{text}", text


def _copy_csv(generator: random.Random) -> Question:
    text = "name,age,city\n" + "\n".join(_lines(generator, _record, 10))
    return f"Repeat this CSV file exactly:\n\n{text}", text


# --- given lines in another form ---


def _reshaping(instruction: str, shape: Callable[[Sequence[str]], str], *, example: bool = True) -> Kind:
    """Return a kind that asks for given lines in a form that an example shows."""

    def make(generator: random.Random) -> Question:
        lines = _lines(generator, _sentence, _SENTENCES)
        shown = [_sentence(generator) for _ in range(3)]
        asked = "\n".join(lines)
        if example:
            before = "\n".join(shown)
            return f"{instruction}\n\nLines:\n{before}\nAnswer:\n{shape(shown)}\n\nLines:\n{asked}\nAnswer:", shape(
                lines
            )
        return f"{instruction}\n\n{asked}", shape(lines)

    return make


def _fill_table(generator: random.Random) -> Question:
    records = [_record(generator, ", ") for _ in range(generator.randint(2, 8))]
    head = "| name | age | city |\n| --- | --- | --- |\n"
    rows = "\n".join("| " + record.replace(", ", " | ") + " |" for record in records)
    return (
        "Write the records as a table.\n\nRecords:\nAnna, 30, Rome\nBen, 41, Oslo\nTable:\n"
        f"{head}| Anna | 30 | Rome |\n| Ben | 41 | Oslo |\n\nRecords:\n" + "\n".join(records) + "\nTable:",
        head + rows,
    )


# --- counting and computing ---


def _count(generator: random.Random) -> Question:
    last = generator.randint(3, 60)
    return f"Count from 1 to {last}, separated by commas.", ", ".join(str(n) for n in range(1, last + 1))


def _count_from(generator: random.Random) -> Question:
    first = generator.randint(1, 40)
    last = first + generator.randint(3, 40)
    return (
        f"Count as here.\n\nFrom 3 to 7: 3, 4, 5, 6, 7\nFrom 11 to 14: 11, 12, 13, 14\n\nFrom {first} to {last}:",
        ", ".join(str(n) for n in range(first, last + 1)),
    )


def _times(generator: random.Random) -> Question:
    word, count = generator.choice(_NOUNS), generator.randint(2, 20)
    return f'Write "cat" 3 times: cat cat cat\nWrite "{word}" {count} times:', " ".join([word] * count)


def _list(generator: random.Random) -> Question:
    things, count = generator.choice(_THINGS), generator.randint(3, 25)
    return (
        f"List {count} {things}, numbered from 1 to {count}. Write only the list.",
        _numbered([generator.choice(_NOUNS) for _ in range(count)]),
    )


def _table(generator: random.Random) -> Question:
    factor, last = generator.randint(2, 12), generator.randint(3, 20)
    return (
        (
            f"Write the multiplication table of {factor}, as in this example for 3 up to 4:\n\n"
            f"3 x 1 = 3\n3 x 2 = 6\n3 x 3 = 9\n3 x 4 = 12\n\nNow for {factor} up to {last}:"
        ),
        "\n".join(f"{factor} x {n} = {factor * n}" for n in range(1, last + 1)),
    )


def _sum(generator: random.Random) -> Question:
    terms = [generator.randint(1, 9) for _ in range(generator.randint(3, 12))]
    total, lines = terms[0], []
    for term in terms[1:]:
        lines.append(f"{total} + {term} = {total + term}")
        total += term
    return (
        f"Add the numbers step by step.\n\n2, 5, 1:\n2 + 5 = 7\n7 + 1 = 8\n\n{', '.join(map(str, terms))}:",
        "\n".join(lines),
    )


KINDS: dict[str, Kind] = {
    "copy": _copying("Repeat this text exactly:", _sentence, _SENTENCES, " "),
    "copy_word_for_word": _copying("Write this text again, word for word:", _sentence, _SENTENCES, " "),
    "copy_say": _copying("Please say the following text to me:", _sentence, _SENTENCES, " "),
    "copy_above": _copy_above,
    "copy_quoted": _copy_quoted,
    "copy_story": _copy_story,
    "copy_example": _copy_example,
    "copy_lines": _copying("Repeat these lines exactly:", _sentence, _SENTENCES),
    "copy_words": _copy_words,
    "copy_numbered": _copy_numbered,
    "copy_pairs": _copying("Repeat these lines exactly:", _pair, 12),
    "copy_csv": _copy_csv,
    "copy_table": _copy_table,
    "copy_code": _copy_code,
    "copy_dialog": _copying("Repeat this conversation exactly:", _turn, _SENTENCES),
    "enumerate": _reshaping("Write these sentences as a numbered list:", _numbered, example=False),
    "dash_example": _reshaping("Write a dash before each line.", _dashed),
    "fill_table": _fill_table,
    "times": _times,
    "count": _count,
    "count_from": _count_from,
    "list": _list,
    "table": _table,
    "sum": _sum,
}

# Kinds that SmolLM2-135M-Instruct followed in at least 70 % of the cases (docs/predictor.md has the table); the others
# are for models that can count.
FOLLOWED = (
    "copy",
    "copy_word_for_word",
    "copy_say",
    "copy_above",
    "copy_quoted",
    "copy_lines",
    "copy_numbered",
)


def generate(count: int, kinds: Sequence[str] = FOLLOWED, seed: int = 0) -> list[Task]:
    """Return `count` different tasks, of every kind in turn; fewer where there are not as many.

    Raises
    ------
    KeyError
        There is no such kind.
    """
    generator = random.Random(seed)  # noqa: S311 - a data set, not a secret
    tasks: dict[str, Task] = {}
    # Some kinds have few different prompts: the number of attempts is limited.
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


def summary(lengths: Sequence[tuple[str, int, int, bool]]) -> list[dict[str, Any]]:
    """Return a row for each kind: how many outputs, the shares that follow and that the limit cut.

    Parameters
    ----------
    lengths
        For each output: its kind, the tokens of the answer asked for, its own tokens, and whether the limit cut it.
    """
    rows = []
    for kind in dict.fromkeys(kind for kind, *_ in lengths):
        own = [(follows(asked, tokens), cut, asked) for name, asked, tokens, cut in lengths if name == kind]
        rows.append(
            {
                "kind": kind,
                "outputs": len(own),
                "followed": round(sum(followed for followed, _, _ in own) / len(own), 4),
                "cut": round(sum(cut for _, cut, _ in own) / len(own), 4),
                "longest_answer": max(asked for _, _, asked in own),
            }
        )
    return sorted(rows, key=lambda row: -row["followed"])
