"""Classes of service in a simulation: as the gateway has them, and which share of the requests belongs to each."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ares.objectives import ServiceClass, seconds
from ares.simulator.state import State
from ares.text_files import TextFileError, read_text
from ares.yaml_text import MALFORMED, parse

DEFAULT = "default"
# Keeps the draw of classes independent of those of lengths and prediction errors with the same seed.
_STREAM = 0xC1A55


class SimulatedClass(ServiceClass):
    """A class of service, and the share of the requests that name it."""

    share: float = Field(gt=0, le=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    classes: dict[Annotated[str, Field(min_length=1)], SimulatedClass] = Field(min_length=1)


class ClassesError(ValueError):
    """A file of classes that cannot be used."""


def read_classes(path: Path) -> dict[str, SimulatedClass]:
    """Return the classes of a YAML file; ClassesError where it cannot be used, with the reason."""
    try:
        classes = _File.model_validate(parse(read_text(path))).classes
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ClassesError(f"--classes {path}: {where}: {first['msg']}") from None
    except (OSError, TextFileError, *MALFORMED) as error:
        raise ClassesError(f"--classes {path}: {error}") from None
    if DEFAULT in classes:
        raise ClassesError(f"--classes {path}: {DEFAULT} is the name of the requests that belong to no class")
    if math.fsum(one.share for one in classes.values()) > 1.0 + 1e-9:
        raise ClassesError(f"--classes {path}: the shares are more than 1 together")
    return classes


def assign(classes: Mapping[str, SimulatedClass], requests: int, seed: int) -> NDArray[np.int64]:
    """Draw the class of each request, shape (R,): 0 for no class, 1 for the first of `classes`, and so on."""
    shares = [one.share for one in classes.values()]
    bounds = np.cumsum([max(1.0 - math.fsum(shares), 0.0), *shares])
    drawn = np.random.default_rng((seed, _STREAM)).random(requests) * bounds[-1]
    chosen: NDArray[np.int64] = np.searchsorted(bounds, drawn, side="right").astype(np.int64)
    return chosen


def apply(classes: Mapping[str, SimulatedClass], chosen: NDArray[np.int64], state: State) -> None:
    """Give the requests of each class its rank and its objectives, where it has its own."""
    for number, one in enumerate(classes.values(), 1):
        members = chosen == number
        state.rank[members] = one.rank
        if one.ttft_s is not None:
            state.ttft[members] = one.ttft_s
        if one.tpot_s is not None:
            state.tpot[members] = one.tpot_s
        if one.gap_s is not None:
            state.gap[members] = seconds(one.gap_s)


def names(classes: Mapping[str, SimulatedClass]) -> Sequence[str]:
    """Return the names of the classes by their number."""
    return (DEFAULT, *classes)
