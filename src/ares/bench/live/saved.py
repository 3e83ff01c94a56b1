"""Runs of `ares bench live` on disk, with all that the simulator needs to simulate them."""

from pathlib import Path
from typing import Any

import msgspec

from ares.bench.live.client import Run
from ares.text_files import TextFileError, read_text

FORMAT = 1
"""Version of the file format."""
_TICK_S = 1e-4
# Lengths of outputs that a gateway keeps (policy/residual_life.py).
_REMEMBERED = 2000


class Request(msgspec.Struct, frozen=True):
    """A completed request, as its client saw it.

    `at_s` counts from the start of the run; `ticks` are the times of its tokens in units of 0.1 ms: the first from
    `at_s`, each other from the one before.
    """

    name: str
    at_s: float
    prompt_tokens: int
    ticks: list[int]

    @property
    def times_s(self) -> list[float]:
        """Seconds from the start of the run of each token."""
        times, at = [], 0
        for tick in self.ticks:
            at += tick
            times.append(self.at_s + at * _TICK_S)
        return times


class Move(msgspec.Struct, frozen=True):
    """A migration: when it was ordered, how it went, and what it cost its stream."""

    request: str
    at_s: float
    outcome: str
    stall_s: float | None = None
    pulled_tokens: int | None = None


class Instance(msgspec.Struct, frozen=True):
    """An instance's sizes; 0 where its engine does not report them. `step_time_coefficients`: fitted by the gateway."""

    name: str
    role: str
    capacity_tokens: int = 0
    kv_blocks: int = 0
    block_size: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    step_time_coefficients: list[float] | None = None


class RequestView(msgspec.Struct, frozen=True, array_like=True):
    """A request at one moment, as the gateway's status showed it.

    `instance` is None outside of decode; `remaining` is the predicted median, None where the engine does not predict.
    """

    instance: str | None
    state: str
    output_tokens: int = 0
    remaining: float | None = None


class Sample(msgspec.Struct, frozen=True):
    """The requests of the cluster at one moment."""

    at_s: float
    where: dict[str, RequestView]


class SavedRun(msgspec.Struct, frozen=True):
    """A run under one preset.

    Attributes
    ----------
    settings
        The preset with its settings, period, cooldown and objectives, as the gateway's status shows them.
    failed
        Requests that did not complete, and are not in `requests`.
    limit_tokens
        The limit on the output of every request; None where it was not the same for all.
    ended_before
        Lengths of outputs that this gateway had seen end before the run, the newest last.
    """

    preset: str
    requests: list[Request]
    moves: list[Move]
    samples: list[Sample]
    instances: list[Instance]
    settings: dict[str, Any]
    preemptions: int
    suspensions: int
    failed: int = 0
    limit_tokens: int | None = None
    ended_before: list[int] = []

    @property
    def predicted(self) -> bool:
        """Whether the engines predicted lengths; otherwise the gateway used residual life."""
        return any(seen.remaining is not None for sample in self.samples for seen in sample.where.values())


class SavedRuns(msgspec.Struct, frozen=True):
    """A file of runs over the same engines; `about` says where they come from."""

    format: int
    about: dict[str, Any]
    runs: list[SavedRun]


def to_saved(run: Run, limit_tokens: int | None, ended_before: list[int]) -> SavedRun:
    """Return a run in the form of the file."""
    came = sorted((seen for seen in run.requests if seen.error is None), key=lambda seen: seen.at_s)
    requests = []
    for seen in came:
        ticks = [round((time - seen.at_s) / _TICK_S) for time in seen.times_s]
        steps = [after - before for before, after in zip([0, *ticks], ticks, strict=False)]
        requests.append(Request(seen.name, round(seen.at_s, 6), max(seen.prompt_tokens, 1), steps))
    moves = [
        Move(
            record["request_id"],
            round(record["started_at"] - run.started_at, 3),
            record["outcome"],
            record["stall_s"],
            record["pulled_tokens"],
        )
        for record in run.migrations
    ]
    return SavedRun(
        preset=run.preset,
        requests=requests,
        moves=moves,
        samples=[
            Sample(sample["at_s"], {name: RequestView(*row) for name, row in sample["where"].items()})
            for sample in run.samples
        ],
        instances=[
            Instance(**{key: value for key, value in row.items() if value is not None}) for row in run.instances
        ],
        settings=run.settings,
        preemptions=run.preemptions,
        suspensions=run.suspensions,
        failed=len(run.requests) - len(came),
        limit_tokens=limit_tokens,
        ended_before=ended_before,
    )


def in_order(runs: list[Run], before: list[int], limit_tokens: int | None) -> list[SavedRun]:
    """Return runs of one gateway, in the order in which they ran, in the form of the file.

    `before` holds the lengths of outputs that had ended before the first.
    """
    kept, ended = [], list(before)
    for run in runs:
        kept.append(to_saved(run, limit_tokens, list(ended)))
        came = sorted((seen for seen in run.requests if seen.error is None), key=lambda seen: seen.last_s)
        ended = (ended + [len(seen.tokens) for seen in came])[-_REMEMBERED:]
    return kept


def write_runs(runs: SavedRuns, file: Path) -> None:
    """Write runs, without line breaks: most of a file are times."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(msgspec.json.encode(runs) + b"\n")


def read_runs(file: Path) -> SavedRuns:
    """Read runs; ValueError names the file and what is wrong with it."""
    try:
        read = msgspec.json.decode(read_text(file), type=SavedRuns)
    except TextFileError as error:
        raise ValueError(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not the runs of `ares bench live --runs`: {error}") from None
    if read.format != FORMAT:
        raise ValueError(f"{file}: runs of format {read.format}; this version reads {FORMAT}")
    return read
