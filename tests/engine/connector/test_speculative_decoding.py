"""What a request exports under speculative decoding: the KV of its tokens, and of no draft that its output lacks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.connector.speculation import DRAFTS, Engine, configuration

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(240)]


@pytest.fixture(params=["draft_model", "ngram"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[16, 32])
def engine(
    request: pytest.FixtureRequest, method: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    monkeypatch.setenv("ARES_INSTANCE", "")
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    made = Engine(configuration(tmp_path, request.param, method=method, asynchronous=asynchronous))
    yield made
    made.close()


def blocks_of(tokens: int, block: int) -> int:
    return -(-tokens // block)


def test_a_cut_exports_the_blocks_of_its_tokens(engine: Engine) -> None:
    """Around a boundary: the target pairs blocks from the last one on, and one too many shifts them all."""
    lengths = set()
    for prompt in range(3 * engine.block - 12, 3 * engine.block + 5):
        for tokens in range(1, DRAFTS + 2):
            engine.tokens = tokens
            request = engine.add(prompt)
            engine.run_until(request, prompt + 1)
            answer = engine.cut(request)
            held = request.num_tokens - 1  # the newest token's KV is computed with the next one
            lengths.add(held - 3 * engine.block)
            assert answer.outcome == "pinned"
            assert answer.output_tokens == request.num_output_tokens
            assert answer.kv_transfer_params["remote_num_tokens"] == held
            own = engine.manager.get_block_ids(request.request_id)[0]
            assert answer.kv_transfer_params["remote_block_ids"] == [own[: blocks_of(held, engine.block)]]
    assert lengths >= set(range(-4, 5))


def test_a_prefill_exports_the_blocks_of_its_prompt(engine: Engine) -> None:
    for prompt in range(3 * engine.block - 4, 3 * engine.block + 5):
        request = engine.add(prompt, do_remote_decode=True)
        engine.run_until(request, prompt + 1)
        transfer = engine.transfer_of(request)
        assert transfer["remote_num_tokens"] == prompt
        assert len(transfer["remote_block_ids"][0]) == blocks_of(prompt, engine.block)


def test_a_copy_holds_full_blocks_of_accepted_tokens(engine: Engine) -> None:
    for prompt in range(3 * engine.block - 12, 3 * engine.block + 5):
        for tokens in range(1, DRAFTS + 2):
            engine.tokens = tokens
            request = engine.add(prompt)
            engine.run_until(request, prompt + 1 + tokens)
            known = request.num_tokens - 1
            copied = engine.copy(request)
            assert copied.tokens == known // engine.block * engine.block
            own = engine.manager.get_block_ids(request.request_id)[0]
            assert copied.kv_transfer_params["remote_block_ids"] == [own[: known // engine.block]]
            assert copied.kv_transfer_params["remote_num_tokens"] == copied.tokens
            engine.cut(request)


def test_a_window_that_the_dropped_drafts_have_moved_past_is_computed_again(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM frees what is out of the window of the last computed token; the target's next token comes before it."""
    monkeypatch.setenv("ARES_INSTANCE", "")
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    block, window = 16, 32
    engine = Engine(configuration(tmp_path, block, asynchronous=asynchronous), window=window)
    engine.tokens = DRAFTS + 1
    pulled = set()
    for prompt in range(4 * block, 6 * block):
        request = engine.add(prompt)
        engine.run_until(request, prompt + 1)
        transfer = engine.cut(request).kv_transfer_params
        held = request.num_tokens - 1
        needed = range((held - window + 1) // block, blocks_of(held, block))
        kept = engine.manager.get_block_ids(request.request_id)[1]
        if all(kept[number] for number in needed):
            assert transfer["remote_num_tokens"] == held
            assert transfer["remote_block_ids"][1][-len(needed) :] == [kept[number] for number in needed]
        else:
            assert transfer["remote_num_tokens"] == 0
        pulled.add(transfer["remote_num_tokens"] > 0)
    engine.close()
    assert pulled == {False, True}


def test_tokens_that_every_target_computes_again_are_not_exported(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With multi-token prediction by three modules vLLM pulls all but the last two tokens of a prompt."""
    from vllm.config import VllmConfig

    monkeypatch.setenv("ARES_INSTANCE", "")
    monkeypatch.delenv("ARES_CONTROL_KEY", raising=False)
    monkeypatch.setattr(VllmConfig, "num_prefill_lookahead_tokens", 3)
    engine = Engine(configuration(tmp_path, 16, asynchronous=asynchronous))
    for prompt in range(3 * engine.block - 12, 3 * engine.block + 5):
        engine.tokens = 1 + prompt % (DRAFTS + 1)
        request = engine.add(prompt)
        engine.run_until(request, prompt + 1)
        transfer = engine.cut(request).kv_transfer_params
        assert transfer["remote_num_tokens"] == request.num_tokens - 2
        assert len(transfer["remote_block_ids"][0]) == blocks_of(request.num_tokens - 2, engine.block)
        prefill = engine.add(prompt, do_remote_decode=True)
        engine.run_until(prefill, prompt + 1)
        transfer = engine.transfer_of(prefill)
        assert transfer["remote_num_tokens"] == prompt - 2
        assert transfer["ares_prompt_shortened"] is True
        assert len(transfer["remote_block_ids"][0]) == blocks_of(prompt - 2, engine.block)
    short = engine.add(2, do_remote_decode=True)  # which vLLM leaves whole
    engine.run_until(short, 3)
    assert "ares_prompt_shortened" not in engine.transfer_of(short)
    engine.close()
