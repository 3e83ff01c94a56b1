"""Prompt files: JSON objects in the shapes of the common data sets, or plain text, one prompt a line.

===========================================  =========================================================================
fields of an object                          the prompt
===========================================  =========================================================================
``prompt``, ``text``                         the text (HumanEval and others)
``question``, ``instruction``                the text, and after an empty line that of ``input`` or ``context``, if
                                             there is any (GSM8K, Alpaca, Dolly)
``messages``, ``conversations``,             the first message of the user: texts, ``{"role", "content"}`` or ``{"from",
``conversation``, ``turns``                  "value"}`` (OpenAI, ShareGPT, LMSYS, MT-bench)
===========================================  =========================================================================

Where an object has several, the first of ``prompt``, ``question``, ``instruction``, ``text`` and the conversations that
is neither null nor empty is used.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ares.predictor.errors import PredictorError
from ares.text_files import TextFileError, read_lines

_TEXTS = ("prompt", "question", "instruction", "text")
# A second field that is appended to the text of a field, where it is present.
_APPENDED = {"question": ("context",), "instruction": ("input", "context")}
_CHATS = ("messages", "conversations", "conversation", "turns")
_USERS = ("user", "human")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TEXT_SUFFIXES = (".txt", ".text")
_TABLE_SUFFIXES = (".csv", ".tsv")
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")
_EXPECTED = f"expected a text in {', '.join(_TEXTS)}, or a conversation in {', '.join(_CHATS)}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. `id` depends on the texts alone, so that a prompt in two files is one prompt."""

    id: str
    text: str

    def behind(self, system: str | None) -> "Prompt":
        """Return the prompt behind a system prompt: another one, with another id, where there is one."""
        return self if system is None else Prompt(Prompt.of(f"{system}\0{self.text}").id, self.text)

    @classmethod
    def of(cls, text: str) -> "Prompt":
        """Return the prompt of a text."""
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], text)


def read(files: Iterable[Path], seed: int = 0, note: Callable[[str], None] = lambda _: None) -> list[Prompt]:
    """Read files and shuffle their prompts, so that the first n prompts are a fair sample of all.

    Parameters
    ----------
    note
        Called with a sentence for each kind of content that is left out of the result.

    Raises
    ------
    PredictorError
        A file cannot be read, holds a malformed line, or holds nothing.
    """
    found: dict[str, Prompt] = {}
    repeated = 0
    for file in files:
        for text, *_ in _read_file(file, note, later=False):
            prompt = Prompt.of(text)
            repeated += prompt.id in found
            found.setdefault(prompt.id, prompt)
    if repeated:
        note(f"{repeated} of {repeated + len(found)} prompts are duplicates, and count once")
    prompts = list(found.values())
    random.Random(seed).shuffle(prompts)  # noqa: S311 - an order, not a secret
    return prompts


def read_conversations(
    files: Iterable[Path], seed: int = 0, note: Callable[[str], None] = lambda _: None
) -> list[list[str]]:
    """Read files as `read` does, and return all that the user says in each conversation; of a prompt that is all."""
    found = {tuple(texts): texts for file in files for texts in _read_file(file, note, later=True)}
    conversations = list(found.values())
    random.Random(seed).shuffle(conversations)  # noqa: S311 - an order, not a secret
    return conversations


def _read_file(file: Path, note: Callable[[str], None], *, later: bool) -> list[list[str]]:
    """Return what the user says in each prompt of a file: the first message, and those after it where `later` is."""
    try:
        lines = list(read_lines(file))
    except TextFileError as error:
        raise PredictorError(str(error)) from error
    if _holds_objects(file, lines, note):
        found = _of_objects(file, lines, note, later=later)
    else:
        found = [[text] for text in _of_lines(lines)]
    if not found:
        raise PredictorError(f"{file}: no prompts in it")
    return found


def _holds_objects(file: Path, lines: list[str], note: Callable[[str], None]) -> bool:
    """Whether a file is JSON: by its suffix, or without a known one (a pipe has none) by its first line."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in _PACKED_SUFFIXES]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _TABLE_SUFFIXES:
        raise PredictorError(f"{file}: tables are not read: write one JSON object a line, with the text in `prompt`")
    if suffix in _JSON_SUFFIXES:
        return True
    looks = _looks_like_json(next((line for line in lines if line.strip()), "").strip())
    if suffix in _TEXT_SUFFIXES and looks:
        note(f"{file}: its lines are used as text, though they are JSON; to read their fields name the file .jsonl")
    return looks and suffix not in _TEXT_SUFFIXES


def _looks_like_json(line: str) -> bool:
    if line in ("{", "[", "[{"):
        return True
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def _of_lines(lines: list[str]) -> list[str]:
    # Only spaces and tabs: a form feed or U+2028, which Python strips too, is part of a text.
    return [text for line in lines if (text := line.strip(" \t")).strip()]


def _of_objects(file: Path, lines: list[str], note: Callable[[str], None], *, later: bool) -> list[list[str]]:
    found = []
    unread: Counter[str] = Counter()
    for where, row in _objects(file, lines):
        taken = _fields(row, where)
        value = row[taken[0]]
        if isinstance(value, list):
            texts = list(islice(_of_user(value, where), None if later else 1))
            unread["messages of the system"] += "system" in _speakers(value)
            several = sum(speaker in _USERS for speaker in _speakers(value)) > 1
            unread["later messages of the user"] += several and not later
        else:
            texts = [text for text in ["\n\n".join(row[name] for name in taken)] if text.strip()]
        if texts:
            found.append([_encodable(text, where) for text in texts])
        else:
            unread["conversations without a message of a user"] += 1
        unread.update(f"`{name}`" for name, other in row.items() if name not in taken and _holds_text(other))
    if +unread:
        note(f"{file}: not read: {', '.join(f'{what} ({count})' for what, count in (+unread).items())}")
    return found


def _objects(file: Path, lines: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each object is in the file, and the object: one per line, or all in one array."""
    rows = ((f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
    if next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        every = _json("\n".join(lines), str(file))
        found = ((f"{file}: entry {number}", row) for number, row in enumerate(every, 1))
    else:
        found = ((where, _json(line, where)) for where, line in rows)
    for where, row in found:
        if not isinstance(row, dict):
            raise PredictorError(f"{where}: no prompt: not a JSON object; {_EXPECTED}")
        yield where, row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PredictorError(f"{where}: not JSON: {error}; write one object a line, or one array of them") from error


def _holds_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _fields(row: dict[str, Any], where: str) -> list[str]:
    """Return the fields that make the prompt: a conversation, or a text and the one appended to it."""
    empty = next((name for name in _CHATS if row.get(name) == []), None)
    name = next((name for name in (*_TEXTS, *_CHATS) if _holds(row.get(name))), empty)
    if name is None:
        raise PredictorError(f"{where}: no prompt; {_EXPECTED}")
    value = row[name]
    if isinstance(value, list) and (name in _CHATS or all(isinstance(turn, dict) for turn in value)):
        return [name]
    if name in _CHATS or not isinstance(value, str):
        wanted = "list of messages" if name in _CHATS else "text"
        raise PredictorError(f"{where}: no prompt: `{name}` is not a {wanted}; {_EXPECTED}")
    appended = [other for other in _APPENDED.get(name, ()) if _holds(row.get(other))][:1]
    for other in appended:
        if not isinstance(row[other], str):
            raise PredictorError(f"{where}: `{other}`, which belongs to `{name}`, is not text")
    return [name, *appended]


def _holds(value: Any) -> bool:
    return _holds_text(value) if isinstance(value, str) else value not in (None, [], {})


def _of_user(turns: list[Any], where: str) -> Iterator[str]:
    """Yield the messages of the user of a conversation, without empty ones."""
    speaker: Any
    content: Any
    for turn in turns:
        if isinstance(turn, str):
            speaker, content = "user", turn
        elif isinstance(turn, dict):
            speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        else:
            raise PredictorError(f"{where}: no prompt: a turn is neither a text nor an object")
        if speaker in _USERS:
            text = _joined(content, where)
            if text.strip():
                yield text


def _speakers(turns: list[Any]) -> list[Any]:
    return [turn.get("role", turn.get("from")) if isinstance(turn, dict) else "user" for turn in turns]


def _joined(content: Any, where: str) -> str:
    """Return a message's content: a text, or a list of parts that are texts."""
    parts = [{"text": content or ""}] if content is None or isinstance(content, str) else content
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts] if isinstance(parts, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PredictorError(f"{where}: no prompt: a message holds something other than text")
    return "".join(str(text) for text in texts)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise PredictorError(f"{where}: not valid text: {error}") from error
    return text
