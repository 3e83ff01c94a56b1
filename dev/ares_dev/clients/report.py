"""What the script of a client is given and what it reports, as lines of JSON.

A script runs with the Python of its client, so that it and this file import that client and the standard library
alone. Each check is one line of the report when it ends: a script that is stopped has reported what it did until then.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# One tool and one question for all clients.
QUESTION = "What is the weather in Oslo right now?"
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the current weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Name of the city"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOL: Any = {"type": "function", "function": FUNCTION}
# The question after an earlier call: a small model writes its own in the same form, which `tool_choice` auto leaves to
# it.
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Rome right now?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "21 C and clear"},
    {"role": "assistant", "content": "It is 21 C and clear in Rome."},
    {"role": "user", "content": QUESTION},
]

# What a chat with tools ended with.
PARSED, ANSWERED = "parsed", "answered in text"
# Errors that one check keeps, each this long.
_ERRORS, _ERROR_CHARACTERS = 3, 600


@dataclass(frozen=True)
class Target:
    """The gateway that a client is sent to."""

    url: str
    model: str
    tokenizer: str
    """A folder or the name of a tokenizer, for clients that count or make tokens."""
    tokens: int = 16
    """Output tokens of each plain request."""


@dataclass
class Check:
    """One thing that a client does, of one or more requests."""

    name: str
    requests: int = 1
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    tool_call: str | None = None
    """`PARSED` or `ANSWERED`, of a chat with tools."""

    def fail(self, error: str, requests: int = 1) -> None:
        """Count failed requests; the text of the first ones is kept."""
        self.failed += requests
        if len(self.errors) < _ERRORS:
            self.errors.append(error[:_ERROR_CHARACTERS])

    def called(self, function: str, arguments: Any) -> None:
        """Check a parsed tool call; arguments may be the JSON text of OpenAI's API.

        Raises
        ------
        AssertionError
            The call is not one of the tool that was given.
        """
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        expect(
            function == FUNCTION["name"] and isinstance(arguments, dict) and isinstance(arguments.get("city"), str),
            f"the call is {function}({arguments!r})",
        )
        self.tool_call = PARSED

    def answered(self, text: str | None, *, forced: bool = False) -> None:
        """Accept an answer instead of a call, unless a call was forced or is in the text unparsed.

        Raises
        ------
        AssertionError
            There should have been a parsed call.
        """
        expect(not forced, f"a tool call was required; the reply is {text!r}")
        expect(bool(text) and FUNCTION["name"] not in str(text), f"an unparsed call: {text!r}")
        self.tool_call = ANSWERED


def expect(condition: bool, otherwise: str) -> None:
    """Raise `AssertionError` with this text unless the condition holds; unlike assert, with any flags of Python."""
    if not condition:
        raise AssertionError(otherwise)


class Report:
    """The lines of a report, each written when its check ends."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @contextlib.contextmanager
    def check(self, name: str, requests: int = 1) -> Iterator[Check]:
        """Report what is done inside; an exception is the failure of one request, and the next check is run."""
        check = Check(name, requests)
        try:
            yield check
        except Exception as error:
            check.fail(f"{type(error).__name__}: {error}")
        with self._file.open("a") as lines:
            lines.write(json.dumps(asdict(check)) + "\n")


def main(run: Callable[[Target, Report], None]) -> None:
    """Run a script: its arguments are the target, as JSON, and the file of the report."""
    run(Target(**json.loads(sys.argv[1])), Report(Path(sys.argv[2])))
