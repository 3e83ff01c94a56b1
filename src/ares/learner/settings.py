"""The learner's settings, resolved once: a YAML file, then `ARES_LEARNER_*` variables, then flags; later ones win."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from ares import yaml_text
from ares.learner.errors import LearnerError
from ares.logs import Format, Level
from ares.resolved_settings import resolve
from ares.variables import LEARNER_PREFIX as PREFIX
from ares.variables import has_other_use
from ares.yaml_text import MALFORMED

_Positive = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]
# The probability that an interval contains the true difference.
_Confidence = Annotated[float, Field(ge=0.5, lt=1)]


class LearnerSettings(BaseSettings):
    """What the learner learns from, when it trains, how it judges, and what it keeps."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, allow_inf_nan=False)

    folder: Path
    """The learner's own folder: recorded states, versions, history."""
    gateways: list[str] = Field(default_factory=list)
    """Base URLs of gateways: their instances are learned from, and they show what the learner does."""
    workers: list[str] = Field(default_factory=list)
    """Base URLs of further instances."""
    model: str | None = Field(default=None, min_length=1)
    """The model to learn for; by default that of the first recorded states."""
    checkpoints: list[Path] = Field(default_factory=list)
    """Checkpoints that instances may have been started with, besides those that ship."""

    threads: _Positive = 1
    """CPU threads of training and judging."""
    nice: int = Field(default=10, ge=0, le=19)
    """Niceness of the learner's processes."""
    first_outputs: _Positive = 300
    """Complete outputs that the first training needs."""
    growth: float = Field(default=0.5, gt=0)
    """Share of new complete outputs, of those that the last training had, that the next one needs."""
    pause_s: _Seconds = 1200.0
    """Least time between the starts of two trainings."""
    most_pairs: _Positive = 60_000
    """Most recorded states that one training reads, the newest."""
    memory_bytes: _Positive = 4 << 30
    """About the most memory that a training takes; with wide models it bounds the states before `most_pairs` does."""
    epochs: _Positive = 100
    """Most epochs of a training."""
    job_timeout_s: _Seconds = 7200.0
    """A training or a judging that takes longer is killed."""

    looks: list[_Positive] = Field(default=[150, 300, 600, 1200, 2400], min_length=1)
    """Numbers of outputs at which a challenger is judged; after the last one it is rejected."""
    confidence: _Confidence = 0.99
    """Confidence of the intervals in a trial, at each look."""
    fewest_prompts: int = Field(default=30, ge=2)
    """A difference over fewer distinct prompts than this decides nothing."""
    window_outputs: _Positive = 600
    """The newest outputs on which the champion is compared with the curve."""
    window_fewest: _Positive = 150
    """Fewer outputs than this since the champion was trained demote nothing."""
    check_outputs: _Positive = 100
    """New outputs between two of these comparisons."""
    window_confidence: _Confidence = 0.999
    """Confidence of the interval that demotes a champion: it is looked at without end."""

    keep_days: float = Field(default=7.0, gt=0)
    """Recorded states are deleted after this long."""
    keep_bytes: _Positive = 2 << 30
    """And the oldest of them where all together are larger than this."""
    keep_versions: _Positive = 10
    """Checkpoints that are kept, besides champion and challenger."""
    stale_s: _Seconds = 600.0
    """A running output of which nothing has come for this long counts as lost."""

    find_s: _Seconds = 10.0
    """Between two questions to a gateway or an address about instances."""
    take_s: _Seconds = 2.0
    """Between two questions to an instance that had nothing recorded."""
    answer_s: _Seconds = 10.0
    """An instance answers a command within this long."""
    retry_s: _Seconds = 600.0
    """After this long, a checkpoint is sent again to an instance that has refused it."""
    report_s: _Seconds = 5.0
    """Between two reports to the gateways."""

    log_format: Format = "text"
    """Whether the log has lines of text or of JSON."""
    log_level: Level = "info"
    """The lowest level that is logged."""

    @field_validator("gateways", "workers")
    @classmethod
    def _urls(cls, value: list[str]) -> list[str]:
        for url in value:
            if not url.startswith(("http://", "https://")) or "@" in url:
                raise ValueError(f"{url!r} is not a base URL such as http://127.0.0.1:8000")
        return [url.rstrip("/") for url in value]

    @field_validator("looks")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError("the numbers of outputs must rise")
        return value

    @model_validator(mode="after")
    def _reachable(self) -> "LearnerSettings":
        if not self.gateways and not self.workers:
            raise ValueError("nothing to learn from: give --gateway URL, or --worker URL for each instance")
        if self.window_fewest > self.window_outputs:
            raise ValueError("window_fewest cannot be more than window_outputs")
        return self


class Keys(BaseSettings):
    """Keys, never in the learner's own settings or files."""

    model_config = SettingsConfigDict(env_prefix="ARES_", frozen=True, extra="ignore")

    control_key: SecretStr | None = None
    admin_key: SecretStr | None = None
    worker_api_key: SecretStr | None = None


def load(file: Path | None = None, given: dict[str, Any] | None = None) -> LearnerSettings:
    """Resolve the settings.

    Parameters
    ----------
    file
        YAML file with any of them.
    given
        Settings of the command line; text is read as what the setting is.

    Raises
    ------
    LearnerError
        A setting is unknown, missing or wrong.
    """
    _refuse_unknown_variables()
    return resolve(LearnerSettings, file, given or {}, refuse=LearnerError, explain=_message, example="threads: 2")


def assignments(texts: list[str]) -> dict[str, Any]:
    """Return settings of `--set NAME=VALUE`, the value as YAML; LearnerError where one has no such form."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("learner.").replace("-", "_")
        if not equals or not name:
            raise LearnerError(f"--set {text!r}: expected NAME=VALUE, such as --set first_outputs=500")
        try:
            found[name] = yaml_text.parse(value)
        except MALFORMED as error:
            raise LearnerError(f"--set {text!r}: {error}") from error
    return found


def _refuse_unknown_variables() -> None:
    known = {PREFIX + name.upper() for name in LearnerSettings.model_fields}
    for name, value in os.environ.items():
        if name.upper().startswith(PREFIX) and name.upper() not in known and not has_other_use(name.upper(), value):
            similar = difflib.get_close_matches(name.upper(), known, 1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise LearnerError(f"{name} is not a setting of the learner{hint}")


def _message(first: ErrorDetails) -> str:
    name = ".".join(map(str, first["loc"]))
    text = first["msg"].removeprefix("Value error, ")
    if not name:
        return text
    if first["type"] == "extra_forbidden":
        similar = difflib.get_close_matches(name, LearnerSettings.model_fields, 1)
        return f"setting {name!r} is unknown" + (f"; did you mean {similar[0]}?" if similar else "")
    if first["type"] == "missing":
        return f"setting {name!r} is missing: give --{name}, {PREFIX}{name.upper()}, or {name}: in a --config file"
    variable = PREFIX + str(first["loc"][0]).upper()
    return f"setting {name!r}{f' ({variable})' if variable in os.environ else ''}: {text}"
