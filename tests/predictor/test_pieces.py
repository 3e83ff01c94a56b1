"""Outputs that were written in pieces."""

from pathlib import Path

import numpy as np
import pytest

from ares.predictor import dataset, shards
from ares.predictor.errors import PredictorError
from ares.predictor.shards import Outcome, Output
from tests.predictor.synthetic import HIDDEN, source

LIVE = shards.Source("synthetic/model", HIDDEN, 20, 200, shards.LIVE)


def piece(request: str, length: int, positions: list[int], outcome: Outcome, limit: int = 0) -> Output:
    """Return a piece whose states are its positions."""
    states = [np.full(HIDDEN, position, np.float16) for position in positions]
    return Output(request, f"prompt of {request}", [1, 2], [7] * length, True, positions, states, outcome, limit)


def written(folder: Path, *of_shards: list[Output]) -> list[Path]:
    """Write one shard for each list; return them in that order."""
    return [shards.write(folder, LIVE, outputs) for outputs in of_shards]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_pieces_are_joined_in_any_order(tmp_path: Path, order: tuple[int, int, int]) -> None:
    """A prefill instance has position 0, and a decode instance the rest."""
    files = written(
        tmp_path,
        [piece("a", 1, [0], Outcome.LEFT)],
        [piece("a", 45, [20, 40], Outcome.RUNNING, 90), piece("b", 30, [20], Outcome.RUNNING)],
        [piece("a", 70, [60], Outcome.STOP, 90)],
    )
    pairs = dataset.load_files([files[n] for n in order])
    of_a = pairs.output == pairs.requests.index("a")
    assert pairs.position[of_a].tolist() == [0, 20, 40, 60]
    assert pairs.states[of_a][:, 0].tolist() == [0, 20, 40, 60]
    assert pairs.remaining[of_a].tolist() == [70, 50, 30, 10]
    assert pairs.room[of_a].tolist() == [90, 70, 50, 30]
    assert not pairs.censored[of_a].any()
    assert pairs.censored[~of_a].all()
    outcomes = dict(zip(pairs.requests, pairs.outcomes, strict=True))
    assert outcomes == {"a": "stop", "b": "running"}
    assert dict(zip(pairs.requests, pairs.limits.tolist(), strict=True)) == {"a": 90, "b": 200}


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        ((45, Outcome.RUNNING), (45, Outcome.LEFT), Outcome.LEFT),
        ((60, Outcome.LEFT), (80, Outcome.RUNNING), Outcome.RUNNING),
        ((80, Outcome.RUNNING), (60, Outcome.LEFT), Outcome.RUNNING),
        ((60, Outcome.LIMIT), (45, Outcome.RUNNING), Outcome.LIMIT),
        ((60, Outcome.STOP), (60, Outcome.LEFT), Outcome.STOP),
    ],
)
def test_how_an_output_ended(
    tmp_path: Path, first: tuple[int, Outcome], then: tuple[int, Outcome], expected: Outcome
) -> None:
    """It was cancelled; it was moved, and the pieces arrive in either order; it ended."""
    of = [[piece("a", length, [0], outcome)] for length, outcome in (first, then)]
    pairs = dataset.load_files(written(tmp_path, *of))
    assert pairs.outcomes == (expected,)
    assert pairs.lengths.tolist() == [max(first[0], then[0])]


def test_a_prefill_that_arrives_late_does_not_end_its_output(tmp_path: Path) -> None:
    prefill = [piece("a", 1, [0], Outcome.LEFT)]
    decode = [piece("a", 1, [], Outcome.RUNNING, 90)]
    files = written(tmp_path, decode, prefill)
    for order in (files, files[::-1]):
        assert dataset.load_files(order).outcomes == ("running",)


def test_a_position_that_two_pieces_have_counts_once(tmp_path: Path) -> None:
    """Before and after a preemption, or a shard that was sent twice."""
    files = written(tmp_path, [piece("a", 45, [0, 20, 40], Outcome.RUNNING)], [piece("a", 70, [40, 60], Outcome.STOP)])
    assert dataset.load_files([*files, files[0]]).position.tolist() == [0, 20, 40, 60]


def test_a_piece_without_states_ends_its_output(tmp_path: Path) -> None:
    files = written(tmp_path, [piece("a", 15, [0], Outcome.RUNNING)], [piece("a", 18, [], Outcome.STOP)])
    pairs = dataset.load_files(files)
    assert pairs.remaining.tolist() == [18]
    assert pairs.outcomes == ("stop",)


def test_the_token_ids_are_those_of_the_whole_output(tmp_path: Path) -> None:
    files = written(tmp_path, [piece("a", 70, [40], Outcome.STOP)], [piece("a", 45, [0, 20], Outcome.RUNNING)])
    pairs = dataset.load_files(files)
    assert [tokens.tolist() for tokens in pairs.output_tokens] == [[7] * 70]
    pairs.require_token_ids("this")


def test_only_the_chosen_files_are_read(tmp_path: Path) -> None:
    files = written(tmp_path, [piece("a", 45, [0], Outcome.STOP)], [piece("b", 45, [0], Outcome.STOP)])
    assert dataset.load_files(files[1:]).requests == ("b",)


def test_a_chosen_file_that_is_broken_is_named(tmp_path: Path) -> None:
    files = written(tmp_path, [piece("a", 45, [0], Outcome.STOP)], [piece("b", 45, [0], Outcome.STOP)])
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(PredictorError, match=f"{files[0].name}: not a whole shard"):
        dataset.load_files(files)
    with pytest.raises(PredictorError, match="no pairs"):
        dataset.load_files([])


def test_instances_may_have_different_limits_but_not_models(tmp_path: Path) -> None:
    other = shards.Source("synthetic/model", HIDDEN, 20, 100, shards.LIVE)
    short = shards.write(tmp_path, other, [piece("a", 45, [0], Outcome.RUNNING, 80)])
    long = shards.write(tmp_path, LIVE, [piece("b", 150, [0], Outcome.STOP, 160)])
    for files in ([short, long], [long, short]):
        pairs = dataset.load_files(files)
        assert pairs.source.limit == 200
        assert dict(zip(pairs.requests, pairs.limits.tolist(), strict=True)) == {"a": 80, "b": 160}
    collected = shards.write(tmp_path, source(limit=100), [piece("c", 45, [0], Outcome.STOP)])
    with pytest.raises(PredictorError, match="sampling is"):
        dataset.load_files([long, collected])
