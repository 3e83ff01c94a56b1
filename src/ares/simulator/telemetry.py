"""Telemetry: what the policy sees of a simulated cluster."""

import numpy as np
from numpy.typing import NDArray

from ares.policy import Cluster, Preset
from ares.policy.admission import Progress
from ares.policy.cluster import IntArray
from ares.simulator.heaps import compiled
from ares.simulator.instance import advance_to
from ares.simulator.prediction import LEVELS, record_progress
from ares.simulator.profile import Profile
from ares.simulator.state import DECODING, NONE, NOT_LEAVING, State


class Telemetry:
    """Turns the state into the policy's view of it, a `Cluster`."""

    def __init__(self, preset: Preset, profile: Profile, state: State) -> None:
        decode = len(state.time)
        rows = len(state.arrival)
        self.state = state
        self.preset = preset
        self.predicts = bool(state.parameters.has_predictions)
        self.names = tuple(f"decode-{index}" for index in range(decode))
        self.requests = np.zeros(rows, np.int64)
        self.location = np.zeros(rows, np.int64)
        self.resident = np.zeros(rows, np.int64)
        self.remaining = np.zeros((rows, len(LEVELS)))
        self.movable = np.zeros(rows, np.bool_)
        self.capacity = state.total_blocks * int(state.parameters.block_size)
        self.bandwidth = profile.bandwidth_bytes_s
        self.token_bytes = float(profile.kv_bytes_per_token)
        self.stall_s = profile.stall_s

    def cluster(self, now: float) -> Cluster:
        """Return the decode pool as live telemetry would show it; the next call overwrites its arrays."""
        state = self.state
        arrays = (self.requests, self.location, self.resident, self.remaining, self.movable)
        count = write_rows(state, now, self.preset.cooldown_s, *arrays, self.preset.knows_lengths)
        return Cluster(
            instances=self.names,
            capacity_tokens=self.capacity,
            # Reservations of moves in flight: at the target from the start of the copy until the request joins.
            promised_tokens=state.promised * state.parameters.block_size,
            open=state.closed == 0,
            requests=self.requests[:count],
            location=self.location[:count],
            resident_tokens=self.resident[:count],
            movable=self.movable[:count],
            remaining_tokens=self.remaining[:count] if self.predicts else None,
            levels=LEVELS,
            step_base_s=state.step_model[:, 0],
            step_request_s=state.step_model[:, 1],
            step_token_s=state.step_model[:, 2],
            transfer_bytes_s=self.bandwidth,
            token_bytes=self.token_bytes,
            stall_s=self.stall_s,
            block_tokens=int(state.parameters.block_size),
        )

    def progress(self, rows: int, now: float) -> Progress:
        """Return the progress of the requests of the cluster that was made last."""
        return self.progress_of(self.requests[:rows], now)

    def progress_of(self, requests: IntArray, now: float) -> Progress:
        """Return the progress of requests."""
        state = self.state
        return Progress(
            generated=state.observed_generated[requests],
            age_s=now - state.arrival[requests],
            elapsed_s=now - state.first_token[requests],
            ttft_s=state.ttft[requests],
            tpot_s=state.tpot[requests],
            gap_s=state.gap[requests],
            longest_gap_s=state.longest_gap[requests],
            rank=state.rank[requests],
        )


@compiled
def write_rows(
    state: State,
    moment: float,
    cooldown: float,
    requests: NDArray[np.int64],
    location: NDArray[np.int64],
    resident: NDArray[np.int64],
    remaining: NDArray[np.float64],
    movable: NDArray[np.bool_],
    oracle: bool,
) -> int:
    """Write one row for each request at a decode instance, as telemetry would; return the number of rows.

    First those that decode, then those that wait there or have their KV pulled, which cannot be moved. `remaining` has
    one column for each quantile; for the oracle, all hold the true length.
    """
    rows = 0
    for instance in range(len(state.time)):
        advance_to(state, instance, moment)
        step = state.step[instance]
        for at in range(state.batch[instance]):
            request = state.slot_request[instance, at]
            left = state.slot_finish[instance, at] - step
            record_progress(state, request, state.output[request] - left)
            free = state.target[request] == NONE and state.leaving[request] == NOT_LEAVING
            movable[rows] = free and moment - state.last_move[request] >= cooldown
            rows = _write_row(state, request, instance, rows, requests, location, resident, remaining, oracle)
    for instance in range(len(state.time)):
        decoding = rows
        for index in range(state.prefilling[instance]):
            request = state.prefilling_list[instance, index]
            rows = _write_row(state, request, instance, rows, requests, location, resident, remaining, oracle)
        for index in range(state.ready_count[instance]):
            request = state.ready_list[instance, index]
            rows = _write_row(state, request, instance, rows, requests, location, resident, remaining, oracle)
        for index in range(state.arriving_count[instance]):
            request = state.arriving_list[instance, index]
            rows = _write_row(state, request, instance, rows, requests, location, resident, remaining, oracle)
        request = state.head[instance]
        while request != NONE:
            rows = _write_row(state, request, instance, rows, requests, location, resident, remaining, oracle)
            request = state.next_request[request]
        movable[decoding:rows] = False
    return rows


@compiled
def _write_row(
    state: State,
    request: int,
    instance: int,
    row: int,
    requests: NDArray[np.int64],
    location: NDArray[np.int64],
    resident: NDArray[np.int64],
    remaining: NDArray[np.float64],
    oracle: bool,
) -> int:
    requests[row] = request
    location[row] = instance
    if state.status[request] != DECODING:
        record_progress(state, request, state.generated[request])
    resident[row] = state.observed_tokens[request]
    for quantile in range(len(LEVELS)):
        exact = state.output[request] - state.observed_generated[request]
        remaining[row, quantile] = exact if oracle else state.observed_remaining[request, quantile]
    return row + 1
