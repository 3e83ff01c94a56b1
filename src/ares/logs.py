"""The log of a gateway or a learner: lines of text, or of JSON for programs (`--log-format`, `--log-level`)."""

import json
import logging
import math
import time
from typing import Any, Literal

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What every record has (the logging module's LogRecord); all else was given as `extra`.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    It has `time` (UTC, with milliseconds), `level`, `logger`, `message`, the fields that were given as `extra`, and
    with an exception `exception`, its traceback; `process`, where a gateway has several.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = {name: _plain(value) for name, value in record.__dict__.items() if name not in _STANDARD}
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields |= {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.processName != "MainProcess":
            fields["process"] = record.processName
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        first = ("time", "level", "logger", "message")
        return json.dumps({name: fields.pop(name) for name in first} | fields, default=str)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: neither NaN nor infinity is a number there."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def configure(form: Format = "text", level: Level = "info", text: str = TEXT) -> None:
    """Write the log to standard error from now on.

    Parameters
    ----------
    form
        As text or as JSON.
    level
        The lowest level that is written.
    text
        The format of a line of text, as `logging.Formatter` takes it.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(text))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(capture=form == "json")  # otherwise they would be lines of text between the others
