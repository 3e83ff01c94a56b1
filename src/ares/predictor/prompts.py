"""Prompt files: JSONL in the shapes of the common data sets, or plain text, one prompt a line."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares.predictor.errors import PredictorError

# The field that holds the text, in the order in which they are looked for: plain, GSM8K, HumanEval, instruction sets.
_FIELDS = ("prompt", "question", "instruction", "text")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. `id` depends on the text alone, so that a prompt that stands in two files is one prompt."""

    id: str
    text: str

    @classmethod
    def of(cls, text: str) -> "Prompt":
        """Name a text."""
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], text)


def read(files: Iterable[Path], seed: int = 0) -> list[Prompt]:
    """Read files and shuffle what they hold, so that the first n prompts are a fair sample of all.

    Raises
    ------
    PredictorError
        A file cannot be read, holds a malformed line, or holds nothing.
    """
    found: dict[str, Prompt] = {}
    for file in files:
        for prompt in _read_file(file):
            found.setdefault(prompt.id, prompt)
    prompts = list(found.values())
    random.Random(seed).shuffle(prompts)  # noqa: S311 - an order, not a secret
    return prompts


def _read_file(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PredictorError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    jsonl = file.suffix in {".jsonl", ".json"}
    prompts = [
        Prompt.of(_text_of(line, f"{file}:{number}") if jsonl else line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise PredictorError(f"{file}: no prompts in it")
    return prompts


def _text_of(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PredictorError(f"{where}: not JSON: {error}") from error
    if isinstance(row, dict):
        text = next((row[name] for name in _FIELDS if name in row), None)
        if text is None and isinstance(row.get("turns"), list) and row["turns"]:  # MT-bench: the first turn
            text = row["turns"][0]
        if isinstance(text, str) and text.strip():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
                raise PredictorError(f"{where}: no text: {error}") from error
            return text
    raise PredictorError(f"{where}: no prompt; expected a text field {', '.join(_FIELDS)}, or a list of turns")
