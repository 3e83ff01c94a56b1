"""Conversations of several turns, and the figures of a run of them."""

import pytest

from ares.bench.live.client import Observed
from ares.bench.live.conversations import Conversation, Turn, conversations, reusable_tokens
from ares.bench.live.multi_turn import figures


def test_conversations_fit_and_agents_share_their_beginnings() -> None:
    made = conversations(60, 2.0, 2048, 3)
    assert made == conversations(60, 2.0, 2048, 3)
    assert made != conversations(60, 2.0, 2048, 4)
    for one in made:
        assert 1 <= len(one.turns) <= 8
        assert len(one.begins) + sum(len(turn.new) + turn.answer for turn in one.turns) <= 2048
        assert [turn.wait_s > 0 for turn in one.turns] == [number > 0 for number in range(len(one.turns))]
    agents = [one for one in made if len(one.begins) == 512]
    assert 15 < len(agents) < 45
    assert len({one.begins for one in agents}) == 3
    assert len({one.begins for one in made if len(one.begins) == 50}) == 60 - len(agents)
    assert [one.at_s for one in made] == sorted(one.at_s for one in made)


def test_what_could_be_reused_is_all_that_was_there_before() -> None:
    turns = (Turn((1,) * 10, 5, 0.0), Turn((2,) * 20, 5, 1.0))
    chat = Conversation("a", 0.0, (3,) * 100, turns)
    assert reusable_tokens([chat]) == 115
    assert reusable_tokens([chat, chat]) == 115 + 100 + 115


def test_figures_of_a_run() -> None:
    turns = (Turn((1,) * 10, 2, 0.0), Turn((2,) * 20, 2, 1.0))
    load = [Conversation("a", 0.0, (3,) * 100, turns), Conversation("b", 0.0, (4,) * 100, turns)]

    def seen(at_s: float, ttft_s: float, prompt: int, error: str | None = None) -> Observed:
        return Observed("x", at_s, [7, 8], prompt, at_s + ttft_s, at_s + ttft_s + 0.02, 0.02, error)

    found = figures("ares", load, [[seen(0, 0.5, 110), seen(1, 0.1, 132)], [seen(0, 9.0, 110, "it broke")]], 160.0)
    assert (found["turns"], found["failed"], found["prompt_tokens"]) == (4, 1, 242)
    assert found["errors"] == ["it broke"]
    assert found["ttft_first_turns_s"]["p50"] == pytest.approx(0.5)
    assert found["ttft_later_turns_s"]["p99"] == pytest.approx(0.1)
    assert found["share_computed"] == pytest.approx(160 / 242)
    assert found["share_of_reusable_found"] == pytest.approx(82 / 224)
