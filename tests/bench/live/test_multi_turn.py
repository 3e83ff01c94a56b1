"""Conversations of several turns, and the figures of a run of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ares.bench.live.client import Observed
from ares.bench.live.conversations import Conversation, Turn, conversations, reusable_tokens, said_in
from ares.bench.live.multi_turn import figures
from ares.bench.live.simulated_prefixes import Simulated, sent_prompts
from ares.models.cache import ModelError


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


def test_the_hits_of_a_run_are_simulated_by_its_prompts() -> None:
    load = [Conversation(name, 0.0, (3,) * 64, (Turn((n,) * 16, 2, 0.0), Turn((9,) * 30, 2, 1.0))) for n, name in
            enumerate("ab", 4)]  # fmt: skip

    def seen(at_s: float, error: str | None = None) -> Observed:
        return Observed("x", at_s, [7, 8], 0, error=error)

    turns = [[seen(0.0), seen(10.0)], [seen(5.0), seen(20.0, "it broke")]]
    first, second, third = sent_prompts(load, turns, 16)
    assert [(p.arrival_s, p.tokens, len(p.blocks)) for p in (first, second, third)] == [
        (0.0, 80, 5), (5.0, 80, 5), (10.0, 112, 7)
    ]  # fmt: skip
    assert first.blocks[:4] == second.blocks[:4]
    assert first.blocks[4] != second.blocks[4]
    assert third.blocks[:5] == first.blocks
    # One instance finds the shared beginning, and all of the first turn.
    (one, two) = (Simulated.of("llama-8b-rtx4090", None, count) for count in (1, 2))
    assert one.hit_rate("least-time", load, turns) == pytest.approx((64 + 80) / 272)
    # Of two that take turns, the second begins with nothing.
    assert two.hit_rate("static-rr", load, turns) == pytest.approx(80 / 272)


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model of which there is a tokenizer alone: a token a word."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    words = ["?", "User", "Assistant", ":", "one", "two", "three", "four", "five", "six", "seven"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_users_say_what_prompt_files_have(model: str, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    chats: list[Any] = [{"turns": ["one two", "three"]}, {"question": "four five six"}]
    chats += [{"conversations": [{"from": "human", "value": "seven"}, {"from": "gpt", "value": "eight"}]}]
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    said = said_in([file], model, 0, lambda _: None)
    assert sorted(map(len, said)) == [1, 1, 2]
    assert ((1, 3, 10, 2, 3),) in [tuple(texts) for texts in said], "what the assistant said is not asked"
    assert said == said_in([file], model, 0, lambda _: None)
    made = conversations(40, 2.0, 512, 1, said)
    known = {text for texts in said for text in texts}
    for one in made:
        assert len(one.begins) in (0, 128)
        assert len(one.begins) + sum(len(turn.new) + turn.answer for turn in one.turns) <= 512
        assert {turn.new for turn in one.turns[1:]} <= known
    assert any(len(one.turns) > 2 for one in made)
    assert 1 < len({one.begins for one in made}) <= 4
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        said_in([file], str(tmp_path / "empty"), 0, lambda _: None)
