import json
import logging
import math
import subprocess
import sys
from typing import Any

import pytest

from ares import logs


def line(record: logging.LogRecord) -> dict[str, Any]:
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    return dict(json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))


def record(message: str, *args: Any, **fields: Any) -> logging.LogRecord:
    found = logging.LogRecord("ares.pool", logging.WARNING, __file__, 1, message, args, None)
    found.created, found.msecs = 1764446400.25, 250.0
    found.__dict__ |= fields
    return found


def test_a_line_has_the_extra_fields() -> None:
    found = line(record("%s is lost", "decode-0", instance="decode-0", tries=3, share=math.nan, path=object))
    assert found == {
        "time": "2025-11-29T20:00:00.250Z",
        "level": "warning",
        "logger": "ares.pool",
        "message": "decode-0 is lost",
        "instance": "decode-0",
        "tries": 3,
        "share": "nan",
        "path": "<class 'object'>",
    }
    assert list(found)[:4] == ["time", "level", "logger", "message"]


def test_nothing_breaks_a_line() -> None:
    assert line(record("a\nb \ud800 %d", 1, time="mine"))["message"] == "a\nb \ud800 1"
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failed = record("failed")
        failed.exc_info = sys.exc_info()
    assert "ValueError: two\nlines" in line(failed)["exception"]


@pytest.mark.parametrize(("form", "level"), [("json", "warning"), ("text", "debug")])
def test_the_whole_process_writes_in_the_format(form: str, level: str) -> None:
    script = (
        "import logging, warnings; from ares import logs\n"
        f"logs.configure({form!r}, {level!r})\n"
        "for name in ('debug', 'info', 'warning'): getattr(logging.getLogger('x'), name)('told by %s', name)\n"
        "warnings.warn('old')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    written = ran.stderr.splitlines()
    if form == "json":
        found = [json.loads(one) for one in written]
        assert [(one["logger"], one["message"].partition("\n")[0]) for one in found][:1] == [("x", "told by warning")]
        assert found[1]["logger"] == "py.warnings"
        assert len(found) == 2
    else:
        assert [one.partition(" x: ")[2] for one in written[:3]] == [
            f"told by {n}" for n in ("debug", "info", "warning")
        ]
