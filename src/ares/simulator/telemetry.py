"""What the policy sees of a simulated cluster, and how its moves are carried out."""

from dataclasses import dataclass

import numpy as np

from ares.policy import Cluster, MigrationDecision, Preset
from ares.policy.admission import Progress
from ares.policy.cluster import IntArray
from ares.policy.oom_avoidance import NO_TARGET, OomAction
from ares.simulator.admission import begin_suspension
from ares.simulator.moves import begin_move, write_rows
from ares.simulator.prediction import LEVELS
from ares.simulator.profile import Profile
from ares.simulator.state import State


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """One migration that began, and why."""

    time_s: float
    request: int
    source: int
    target: int
    reason: str


class Telemetry:
    """Turns the state into the policy's view, a `Cluster`, and the policy's moves into migrations."""

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

    def view(self, now: float) -> Cluster:
        """Observe the decode pool as the live telemetry would."""
        state = self.state
        arrays = (self.requests, self.location, self.resident, self.remaining, self.movable)
        count = write_rows(state, now, self.preset.cooldown_s, *arrays, self.preset.knows_lengths)
        return Cluster(
            instances=self.names,
            capacity_tokens=self.capacity,
            # Reservations of moves in flight: at the target from the start of the copy to the join.
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
        """Return the progress of the requests of the newest view."""
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

    def carry_out(self, oom_actions: list[OomAction], ordered: list[MigrationDecision], now: float) -> list[MoveRecord]:
        """Begin the moves that their targets have room for, and suspend requests that fit nowhere."""
        begun: list[MoveRecord] = []
        both: list[OomAction | MigrationDecision] = [*oom_actions, *ordered]
        for one in both:
            request = int(self.requests[one.request])
            if one.target == NO_TARGET:
                begin_suspension(self.state, request, now)
            elif begin_move(self.state, request, one.target, now):
                begun.append(MoveRecord(now, request, one.source, one.target, one.reason))
        return begun
