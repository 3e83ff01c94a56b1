"""The data folder: what `collect` and a recording worker write, and training reads.

Each shard is one safetensors file (``part-*.safetensors``), complete in itself: it is written under another name and
then renamed, so that a file with that name is whole. A shard holds outputs (one row per generation) and pairs (one row
per recorded hidden state). A live output is written in *pieces* while it runs, each with the states since the piece
before it and with the length so far; its pieces, also those of several instances, have the same request id and are
joined by `predictor/pieces.py`.

==================  =======  ===========  ==========================================================================
tensor              type     shape        meaning
==================  =======  ===========  ==========================================================================
``states``          float16  pairs, d     hidden state of the last token after the final norm, as the LM head reads it
``output``          int32    pairs        row of the output it belongs to
``position``        int32    pairs        tokens generated before it: 0 at the end of prefill
``remaining``       int32    pairs        ``output_length`` - ``position``: tokens still to come, the stop token
                                          included; a lower bound where censored
``prompt_length``   int32    outputs      tokens of the prompt
``output_length``   int32    outputs      tokens generated, so far where it still runs
``censored``        uint8    outputs      0 where the output ended by itself (outcome ``stop``), else 1
``prompt_tokens``   int32    their sum    token ids of all prompts, one after the other; empty where not recorded
``output_tokens``   int32    their sum    token ids of all outputs, likewise
==================  =======  ===========  ==========================================================================

The metadata (strings) holds ``format``, ``model``, ``hidden_size``, ``tap``, ``every``, ``limit`` and ``sampling``, and
JSON lists with an entry for each output: ``requests`` and ``prompts`` are its id and that of its prompt, ``outcomes``
is how it ended (`Outcome`), and ``limits`` is how many tokens it may have in all, 0 where that is unknown. Shards of
earlier versions have no ``outcomes`` and ``limits``.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.predictor.errors import PredictorError

FORMAT = "1"
# The sampling of live requests, each of which has its own.
LIVE = "live"
# Which hidden state is recorded: after the final norm, of the last token, as the LM head reads it. Files call it `tap`.
HIDDEN_STATE = "final-norm/last-token"
_HALF_MAX = float(np.finfo(np.float16).max)
_TYPES: dict[str, type[np.generic]] = {
    "states": np.float16,
    "output": np.int32,
    "position": np.int32,
    "remaining": np.int32,
    "prompt_length": np.int32,
    "output_length": np.int32,
    "censored": np.uint8,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
}
# Of token ids and lengths.
_KINDS = ("prompt", "output")


class Outcome(StrEnum):
    """How an output ended, as far as its piece knows."""

    RUNNING = "running"
    STOP = "stop"
    # It has as many tokens as its request or the model's context allows.
    LIMIT = "limit"
    # Cancelled, moved to another instance, or lost.
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the states of a data folder come from; the same for all of its shards.

    `limit` is the most tokens of any output. Those of live requests may differ from instance to instance.
    """

    model: str
    hidden_size: int
    every: int
    limit: int
    sampling: str
    hidden_state: str = HIDDEN_STATE

    def joins(self, other: "Source") -> bool:
        """Whether shards of both may be read together."""
        same_limit = self.limit == other.limit or self.sampling == LIVE
        return same_limit and replace(self, limit=other.limit) == other

    def metadata(self) -> dict[str, str]:
        """Return the fields as safetensors' metadata, which holds strings."""
        return {
            "format": FORMAT,
            "model": self.model,
            "hidden_size": str(self.hidden_size),
            "tap": self.hidden_state,
            "every": str(self.every),
            "limit": str(self.limit),
            "sampling": self.sampling,
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> "Source":
        """Read the fields back; KeyError or ValueError where they are not there."""
        return cls(
            model=metadata["model"],
            hidden_size=int(metadata["hidden_size"]),
            every=int(metadata["every"]),
            limit=int(metadata["limit"]),
            sampling=metadata["sampling"],
            hidden_state=metadata["tap"],
        )


@dataclass(slots=True)
class Output:
    """One generation with its hidden states, or a piece of it, as it is being recorded.

    Attributes
    ----------
    positions, states
        Tokens generated before each state, and the states: float16 arrays of the hidden size.
    outcome
        How it ended; None: by itself or by the limit, as `censored` says.
    limit
        How many tokens the whole output may have; 0 where that is unknown.
    """

    request: str
    prompt: str
    prompt_tokens: Sequence[int]
    output_tokens: Sequence[int] = ()
    censored: bool = False
    positions: list[int] = field(default_factory=list)
    states: list[NDArray[np.float16]] = field(default_factory=list)
    outcome: Outcome | None = None
    limit: int = 0

    @property
    def known_outcome(self) -> Outcome:
        """How it ended."""
        return self.outcome or (Outcome.LIMIT if self.censored else Outcome.STOP)


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard in memory: `tensors` as in the table above, and one entry an output in each list."""

    source: Source
    requests: list[str]
    prompts: list[str]
    outcomes: list[Outcome]
    limits: list[int]
    tensors: dict[str, NDArray[Any]]

    @property
    def has_token_ids(self) -> bool:
        """Whether it holds the token ids of its prompts and outputs."""
        return all(self.tensors[f"{kind}_tokens"].size == self.tensors[f"{kind}_length"].sum() for kind in _KINDS)


def sampling(temperature: float, top_p: float) -> str:
    """Return the sampling parameters as a string, by which data folders are compared."""
    return f"temperature {temperature:g}, top_p {top_p:g}"


def half(states: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return states in the precision of the shards; values beyond its range become its largest."""
    return np.clip(states, -_HALF_MAX, _HALF_MAX).astype(np.float16)


def write(
    folder: Path, source: Source, outputs: Sequence[Output], *, token_ids: bool = True, name: str | None = None
) -> Path:
    """Write one shard, whole or not at all.

    Parameters
    ----------
    token_ids
        Whether it is to hold the token ids of prompts and outputs; their lengths are written always.
    name
        Of the file (``part-*.safetensors``); None takes one that no other file has.

    Raises
    ------
    PredictorError
        It cannot be written, for example because the disk is full; the shards before it are untouched.
    """
    from safetensors.numpy import save

    row = np.repeat(np.arange(len(outputs)), [len(o.positions) for o in outputs])
    lengths = np.array([len(o.output_tokens) for o in outputs], np.int32)
    position = np.array([p for o in outputs for p in o.positions], np.int32)
    states = [s for o in outputs for s in o.states]
    tensors: dict[str, NDArray[Any]] = {
        "states": np.stack(states) if states else np.zeros((0, source.hidden_size), np.float16),
        "output": row.astype(np.int32),
        "position": position,
        "remaining": (lengths[row] - position).astype(np.int32),
        "prompt_length": np.array([len(o.prompt_tokens) for o in outputs], np.int32),
        "output_length": lengths,
        "censored": np.array([o.known_outcome is not Outcome.STOP for o in outputs], np.uint8),
        "prompt_tokens": np.array([t for o in outputs if token_ids for t in o.prompt_tokens], np.int32),
        "output_tokens": np.array([t for o in outputs if token_ids for t in o.output_tokens], np.int32),
    }
    metadata = source.metadata() | {
        "requests": json.dumps([o.request for o in outputs]),
        "prompts": json.dumps([o.prompt for o in outputs]),
        "outcomes": json.dumps([o.known_outcome for o in outputs]),
        "limits": json.dumps([o.limit for o in outputs]),
    }
    name = name or f"part-{uuid.uuid4().hex}.safetensors"
    path, unfinished = folder / name, folder / f".{name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise PredictorError(f"{path}: cannot be written: {error}; the shards before it are whole") from error
    return path


def files(folder: Path) -> list[Path]:
    """Return the shards of a folder in a fixed order; none where there is no such folder."""
    return sorted(folder.glob("part-*.safetensors"))


def read(file: Path) -> Shard:
    """Read one shard and check it.

    Raises
    ------
    PredictorError
        It is truncated, of another format, inconsistent, or holds values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, AttributeError, TypeError, ValueError) as error:  # numpy lacks a type
        raise PredictorError(f"{file}: not a whole shard: {error}; remove it, or collect again") from error
    if metadata.get("format") != FORMAT:
        raise PredictorError(f"{file}: format {metadata.get('format')}, this version reads {FORMAT}")
    try:
        source = Source.from_metadata(metadata)
        requests, prompts = json.loads(metadata["requests"]), json.loads(metadata["prompts"])
        _check_names(requests, prompts)
        _check(source, len(requests), tensors)
        outcomes, limits = _outcomes(metadata, source, tensors), _limits(metadata, len(requests))
    except (KeyError, ValueError, RecursionError) as error:
        raise PredictorError(f"{file}: malformed: {error}") from error
    return Shard(source, requests, prompts, outcomes, limits, tensors)


def _outcomes(metadata: dict[str, str], source: Source, tensors: dict[str, NDArray[Any]]) -> list[Outcome]:
    """Return how each output ended; ValueError where the shard contradicts itself."""
    censored = tensors["censored"].tolist()
    if "outcomes" not in metadata:  # of an earlier version
        cut = [Outcome.LIMIT if n >= source.limit else Outcome.LEFT for n in tensors["output_length"].tolist()]
        return [of_cut if c else Outcome.STOP for c, of_cut in zip(censored, cut, strict=True)]
    given = json.loads(metadata["outcomes"])
    if not isinstance(given, list) or len(given) != len(censored):
        raise ValueError(f"outcomes must be a list of {len(censored)} entries")
    outcomes = [Outcome(outcome) for outcome in given]
    if [outcome is not Outcome.STOP for outcome in outcomes] != [bool(c) for c in censored]:
        raise ValueError("outcomes and censored contradict each other")
    return outcomes


def _limits(metadata: dict[str, str], outputs: int) -> list[int]:
    """Return the limit of each output, 0 where it is unknown; ValueError where they are malformed."""
    if "limits" not in metadata:  # of an earlier version
        return [0] * outputs
    limits = json.loads(metadata["limits"])
    if not isinstance(limits, list) or len(limits) != outputs:
        raise ValueError(f"limits must be a list of {outputs} entries")
    if not all(type(limit) is int and 0 <= limit < 1 << 31 for limit in limits):
        raise ValueError("limits must be whole numbers")
    return limits


def _check_names(requests: Any, prompts: Any) -> None:
    for names in (requests, prompts):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the ids of requests and prompts must be lists of strings")
        for name in names:
            name.encode()  # UnicodeEncodeError, a ValueError: JSON can hold half of a surrogate pair
    if len(prompts) != len(requests):
        raise ValueError(f"{len(prompts)} prompts for {len(requests)} outputs")


def _check(source: Source, outputs: int, tensors: dict[str, NDArray[Any]]) -> None:
    if not all(1 <= number < 1 << 31 for number in (source.hidden_size, source.every, source.limit)):
        raise ValueError("hidden_size, every and limit must be positive, in 32 bits")
    for name, kind in _TYPES.items():
        if tensors[name].dtype != kind:
            raise ValueError(f"{name} is {tensors[name].dtype}, expected {np.dtype(kind)}")
        if kind is np.int32 and tensors[name].size and tensors[name].min() < 0:
            raise ValueError(f"{name} is negative")
    pairs = tensors["position"].size
    shapes = {
        "states": (pairs, source.hidden_size),
        "output": (pairs,),
        "position": (pairs,),
        "remaining": (pairs,),
        "prompt_length": (outputs,),
        "output_length": (outputs,),
        "censored": (outputs,),
    }
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tensors[name].shape}, expected {shape}")
    for name in _KINDS:
        count = int(tensors[f"{name}_length"].sum())
        if tensors[f"{name}_tokens"].shape not in {(count,), (0,)}:
            raise ValueError(f"{name}_tokens has shape {tensors[f'{name}_tokens'].shape}, expected {(count,)} or (0,)")
    if outputs and tensors["output_length"].max() > source.limit:
        raise ValueError(f"an output of {tensors['output_length'].max()} tokens, the limit is {source.limit}")
    if pairs and tensors["output"].max() >= outputs:
        raise ValueError("a pair belongs to no output")
    if not np.isfinite(tensors["states"]).all():
        raise ValueError("states hold values that are not finite")


def read_all(folder: Path) -> Iterator[Shard]:
    """Read every shard of a folder; they must have the same source.

    Raises
    ------
    PredictorError
        There is no shard, one cannot be read, or two have different sources.
    """
    found = files(folder)
    if not found:
        raise PredictorError(f"{folder}: no shards (part-*.safetensors) in it; make them with ares predictor collect")
    yield from read_files(found)


def read_files(chosen: Iterable[Path]) -> Iterator[Shard]:
    """Read these shards; they must have the same source.

    Raises
    ------
    PredictorError
        One cannot be read, or two have different sources.
    """
    first: Source | None = None
    for file in chosen:
        shard = read(file)
        first = first or shard.source
        if not shard.source.joins(first):
            raise PredictorError(f"{file}: {_difference(shard.source, first)} in the shards before it")
        yield shard


def _difference(one: Source, other: Source) -> str:
    fields = [n for n in Source.__slots__ if getattr(one, n) != getattr(other, n)]
    return "; ".join(f"{n} is {getattr(one, n)!r}, {getattr(other, n)!r}" for n in fields)


def source(folder: Path) -> Source:
    """Return the source of a folder; PredictorError where there is no shard."""
    return next(read_all(folder)).source


def same_source(folder: Path, wanted: Source) -> None:
    """Raise PredictorError where a folder has another source."""
    there = source(folder)
    if there != wanted:
        raise PredictorError(f"{folder} cannot be continued: {_difference(wanted, there)} there")


def writable(folder: Path) -> None:
    """Raise PredictorError where no shard could be written; called before hours of collection."""
    probe = folder / ".probe.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise PredictorError(f"{folder}: cannot be written: {error}") from error
