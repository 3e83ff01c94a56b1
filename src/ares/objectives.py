"""Objectives in the form of the configuration: classes of service, and the longest gap in seconds, or `none`."""

import math
from typing import Annotated, Literal

import typer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

DEFAULT_GAP_S = 2.0


def seconds_or_none(given: object) -> float | Literal["none"]:
    """Return the seconds, or "none"; ValueError where it is neither."""
    if given == "none":
        return "none"
    try:
        seconds = float(str(given))
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf:
        raise ValueError(f'must be seconds, greater than 0, or "none", not {given!r}')
    return seconds


def seconds(given: object) -> float:
    """Return the seconds, infinite for "none"; ValueError where it is neither."""
    value = math.inf if given == math.inf else seconds_or_none(given)
    return math.inf if value == "none" else value


def json_gap(gap_s: float) -> float | None:
    """Return the objective for JSON: None where there is none."""
    return gap_s if math.isfinite(gap_s) else None


def _option(text: str) -> float:
    try:
        return seconds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


SloGap = Annotated[
    float,
    typer.Option(
        parser=_option, metavar="SECONDS|none", help="Objective for the longest gap of a stream, seconds, or none."
    ),
]
Gap = Annotated[float | Literal["none"], BeforeValidator(seconds_or_none)]


class ServiceClass(BaseModel):
    """A class of service that requests name in `x-ares-class`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ttft_s: float | None = Field(default=None, gt=0)
    """Objective for the time to first token; the gateway's where it is not given."""
    tpot_s: float | None = Field(default=None, gt=0)
    """Objective for the time of each further token."""
    gap_s: Gap | None = Field(default=None)
    """Objective for the longest gap of a stream; "none": it has none, whatever the gateway's is."""
    rank: int = 0
    """Waiting requests of a smaller rank go before all of a larger one."""
