"""Recordings of real vLLM runs: arrivals, and the times of each first and last token."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ares.text_files import read_lines, read_text
from ares.traces import TraceError, Workload

FloatArray = NDArray[np.float64]
_FIELDS = ("input_toks", "output_toks", "arrival_time", "queued_ts", "first_token_ts", "last_token_ts")
# Above every number of a real recording, and small enough that sums of such numbers stay exact.
_MOST = 1e15
# Sizes in the engine's description that are used where present.
_SIZES = {"kv_cache": ("block_size", "num_gpu_blocks"), "engine_kwargs": ("max_num_seqs", "max_num_batched_tokens")}
# Numbers of instances in a gateway's recording, and the smallest valid value of each.
_INSTANCES = {"decode_instances": 1, "prefill_instances": 0}
PARTS = ("all", "first", "second", "even", "odd")


@dataclass(frozen=True, slots=True)
class Recording:
    """One run of one engine; arrays over requests in order of arrival, shape (R,).

    Attributes
    ----------
    workload
        What arrived.
    first_token_s, finish_s
        Seconds from the first arrival.
    meta
        The recorder's description of engine and hardware.
    """

    name: str
    workload: Workload
    first_token_s: FloatArray
    finish_s: FloatArray
    meta: dict[str, Any]

    def times(self, part: str) -> dict[str, FloatArray]:
        """Return TTFT, TPOT and end-to-end seconds of a part of the requests."""
        return request_times(self.workload, self.first_token_s, self.finish_s, chosen(len(self.workload), part))


def chosen(count: int, part: str) -> NDArray[np.bool_]:
    """Return which requests belong to a part."""
    index = np.arange(count)
    parts: dict[str, NDArray[np.bool_]] = {
        "all": index >= 0,
        "first": index < count // 2,
        "second": index >= count // 2,
        "even": index % 2 == 0,
        "odd": index % 2 == 1,
    }
    if part not in parts:
        raise ValueError(f"--part: unknown part {part!r}; known: {', '.join(PARTS)}")
    return parts[part]


def request_times(
    work: Workload, first: FloatArray, finish: FloatArray, mask: NDArray[np.bool_]
) -> dict[str, FloatArray]:
    """Return TTFT, TPOT and end-to-end seconds of the requests in a mask, and their finish."""
    tokens = np.maximum(work.output_tokens - 1, 1)
    return {
        "ttft_s": (first - work.arrival_s)[mask],
        "tpot_s": ((finish - first) / tokens)[mask],
        "e2e_s": (finish - work.arrival_s)[mask],
        "finish_s": finish[mask],
    }


def _meta(read: Any) -> dict[str, Any]:
    """Return the description of the engine; ValueError where it is none."""
    if not isinstance(read, dict):
        raise ValueError("meta.json is not an object")
    for part, names in _SIZES.items():
        sizes = read.get(part) or {}
        if not isinstance(sizes, dict):
            raise ValueError(f"meta.json: {part} is not an object")
        for name in names:
            size = sizes.get(name)
            if size is not None and not (isinstance(size, int) and 0 < size < _MOST):
                raise ValueError(f"meta.json: {part}.{name} is {size!r}")
    for name, least in _INSTANCES.items():
        count = read.get(name, least)
        if not isinstance(count, int) or not least <= count < _MOST:
            raise ValueError(f"meta.json: {name} is {count!r}")
    if not isinstance(read.get("preset", ""), str):
        raise ValueError(f"meta.json: preset is {read['preset']!r}")
    return read


def read_recording(directory: Path) -> Recording:
    """Read a recording; TraceError names the file and the line.

    Arrivals are on the wall clock, other times on the engine's: the first request, which an idle engine queued at once,
    gives the difference.
    """
    path = directory / "requests.jsonl"
    rows = []
    try:
        lines = list(read_lines(path))
        meta = _meta(json.loads(read_text(directory / "meta.json")))
    except (ValueError, RecursionError) as error:  # TextFileError, JSONDecodeError
        raise TraceError(f"{directory}: not a recording: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            row = [float(record[field]) for field in _FIELDS]
        except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise TraceError(f"{path}:{number}: {error!r}") from None
        if not all(abs(value) <= _MOST for value in row) or min(row[:2]) < 0:
            raise TraceError(f"{path}:{number}: a length or time out of range: {row}")
        rows.append(row)
    if len(rows) < 2:
        raise TraceError(f"{path}: a recording needs at least two requests")
    table = np.asarray(rows)
    table = table[np.argsort(table[:, 2], kind="stable")]
    arrival = table[:, 2] - table[0, 2]
    start = table[0, 3]
    work = Workload(directory.name, arrival, table[:, 0].astype(np.int64), table[:, 1].astype(np.int64))
    return Recording(directory.name, work, table[:, 4] - start, table[:, 5] - start, meta)
