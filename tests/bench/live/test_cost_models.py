"""Cost models fitted to what clients saw."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from ares.bench.live import cost_models, saved
from tests.bench.live import recorded_run


def test_the_law_behind_a_run_is_found() -> None:
    fitted = cost_models.Observations(recorded_run.run()).fit()
    assert fitted.prefill_base_s == pytest.approx(recorded_run.PREFILL_BASE_S, rel=0.02)
    assert fitted.prefill_token_s == pytest.approx(recorded_run.PREFILL_TOKEN_S, rel=0.02)
    assert np.abs(fitted.prefill_spread_s).max() < 1e-3
    for running, tokens in ((1, 100), (6, 900)):
        step = recorded_run.BASE_S + recorded_run.REQUEST_S * running + recorded_run.TOKEN_S * tokens
        assert fitted.steps @ [1.0, running, tokens] == pytest.approx([step, step], rel=0.02)
    assert fitted.hand_over_s == pytest.approx(recorded_run.HAND_OVER_S, abs=0.01)
    assert fitted.move_s is None


def test_prompts_that_waited_for_memory_say_nothing_of_prefill() -> None:
    """Under heavy load most of them wait; long prompts are slow without any wait."""
    run, generator = recorded_run.run(rate=0.1), np.random.default_rng(0)
    late = [
        msgspec.structs.replace(one, ticks=[one.ticks[0] + int(generator.integers(6_000, 9_000)), *one.ticks[1:]])
        if number % 5 < 3
        else one
        for number, one in enumerate(run.requests)
    ]
    fitted = cost_models.Observations(msgspec.structs.replace(run, requests=late)).fit()
    assert fitted.prefill_base_s == pytest.approx(recorded_run.PREFILL_BASE_S, rel=0.05)
    assert fitted.prefill_token_s == pytest.approx(recorded_run.PREFILL_TOKEN_S, rel=0.05)


def test_a_stop_of_a_stream_is_no_step() -> None:
    run = recorded_run.run()
    plain = cost_models.Observations(run).fit().steps
    stopped = [
        msgspec.structs.replace(one, ticks=[*one.ticks[:9], 30_000, *one.ticks[10:]]) for one in run.requests[:20]
    ]
    run = msgspec.structs.replace(run, requests=[*stopped, *run.requests[20:]])
    with_stops = cost_models.Observations(run).fit().steps
    load = np.array([1.0, 4, 500])
    assert with_stops @ load == pytest.approx(plain @ load, rel=0.1)


def test_resampling_tells_how_far_a_run_leaves_its_law_open() -> None:
    run, generator = recorded_run.run(), np.random.default_rng(0)
    noisy = [
        msgspec.structs.replace(one, ticks=[one.ticks[0] + int(generator.integers(0, 100)), *one.ticks[1:]])
        for one in run.requests
    ]
    seen = cost_models.Observations(msgspec.structs.replace(run, requests=noisy))
    drawn = [seen.resampled(np.random.default_rng(seed)).prefill_token_s for seed in range(4)]
    assert np.std(drawn) > 1e-4 * recorded_run.PREFILL_TOKEN_S
    assert drawn == pytest.approx([recorded_run.PREFILL_TOKEN_S] * 4, rel=0.05)


def test_a_run_with_too_little_in_it_is_refused() -> None:
    run = recorded_run.run()
    with pytest.raises(cost_models.FitError, match="3 completed requests are too few"):
        cost_models.Observations(msgspec.structs.replace(run, requests=run.requests[:3]))


def test_a_pause_of_moves_comes_from_other_runs_where_this_one_has_none() -> None:
    run = recorded_run.run()
    alone = cost_models.Observations(run).fit()
    moved = saved.Move("r3", 4.0, "moved", 0.25, 100)
    failed = saved.Move("r4", 4.0, "returned", 9.0, 100)
    other = cost_models.Observations(msgspec.structs.replace(run, moves=[moved, failed])).fit()
    assert other.move_s is not None
    assert 0.15 < other.move_s < 0.25
    assert cost_models.with_move_time(alone, [alone, other]).move_s == other.move_s
    assert cost_models.with_move_time(alone, [alone]).move_s is None


def test_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "runs.json"
    runs = saved.SavedRuns(saved.FORMAT, {"model": "m"}, [recorded_run.run(20)])
    saved.write_runs(runs, file)
    assert saved.read_runs(file) == runs
    saved.write_runs(msgspec.structs.replace(runs, format=99), file)
    with pytest.raises(ValueError, match=r"runs\.json: runs of format 99"):
        saved.read_runs(file)
    file.write_text('{"benchmark": "live"}')
    with pytest.raises(ValueError, match="not the runs of"):
        saved.read_runs(file)
