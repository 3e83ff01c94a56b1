"""How recorded outputs are divided into shards."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]

from ares.engine.prediction.shard_sizes import LARGEST_BYTES, shards_of  # noqa: E402 - it needs vLLM's package
from ares.predictor import dataset, shards  # noqa: E402 - likewise

SOURCE = shards.Source("m", 4096, 20, 1 << 20, shards.LIVE)


def output(name: str, states: int, prompt: int = 3) -> shards.Output:
    positions = list(range(0, 20 * states, 20))
    return shards.Output(
        name,
        "p",
        [1] * prompt,
        [7] * (20 * states + 1),
        positions=positions,
        states=[np.full(SOURCE.hidden_size, n, np.float16) for n in range(states)],
        outcome=shards.Outcome.STOP,
    )


def test_no_shard_is_too_large_and_nothing_is_lost(tmp_path: Path) -> None:
    """The longest has more states than a shard can hold, as a model of this width makes in half an hour."""
    outputs = [output("a", 100), output("long", 600), *(output(f"b{n}", 3) for n in range(150))]
    files = [
        shards.write(tmp_path, SOURCE, shard, token_ids=token_ids)
        for shard, token_ids in shards_of(outputs, SOURCE, token_ids=True)
    ]
    assert max(file.stat().st_size for file in files) < LARGEST_BYTES + (64 << 10)
    pairs = dataset.load_files(files)
    assert sorted(pairs.requests) == sorted(each.request for each in outputs)
    of_long = pairs.output == pairs.requests.index("long")
    assert pairs.states[of_long][:, 0].tolist() == list(range(600))
    assert pairs.remaining[of_long][-1] == 21
    pairs.require_token_ids("this")


def test_the_token_ids_of_a_very_long_prompt_are_left_out(tmp_path: Path) -> None:
    outputs = [output("a", 2), output("long", 2, prompt=1_000_000)]
    made = [(shard, ids) for shard, ids in shards_of(outputs, SOURCE, token_ids=True)]
    assert [([each.request for each in shard], ids) for shard, ids in made] == [(["a"], True), (["long"], False)]
    assert shards.write(tmp_path, SOURCE, made[1][0], token_ids=False).stat().st_size < LARGEST_BYTES


def test_nothing_makes_no_shard() -> None:
    assert not list(shards_of([], SOURCE, token_ids=False))
