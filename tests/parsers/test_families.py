"""Each family of parsers: what the gateway gives is what vLLM's own chat route gives for the same tokens."""

import itertools

import pytest

pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")

from tests.parsers import ours
from tests.parsers.families import ANSWERS, CHATS, FAMILIES, PROMPT, Both, Family, load, taken
from tests.parsers.models import ids

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    """Families that are loaded, by name."""
    return load(tmp_path_factory.mktemp("families"))


def outputs(family: Family) -> list[tuple[list[list[int]], str]]:
    """Return the outputs in deltas of one, two and five tokens, ended by a stop token or by the limit."""
    ways = itertools.product([*family.outputs, *ANSWERS], (1, 2, 5), ("stop", "length"))
    found = []
    for output, size, reason in ways:
        tokens = ids(output + ("<|im_end|>" if reason == "stop" else ""))
        chunks = [tokens[n : n + size] for n in range(0, len(tokens), size)]
        if chunks:
            found.append((chunks, reason))
    return found


PAIRS = [pair for pair in itertools.product(FAMILIES, CHATS) if taken(*pair)]


@pytest.mark.parametrize(("name", "chat"), PAIRS)
async def test_streams_are_those_of_vllm(made: dict[str, Both], name: str, chat: str) -> None:
    both, body = made[name], {"messages": [{"role": "user", "content": "Hi"}], **CHATS[chat]}
    prompt = ids(PROMPT + ("<think>\n\n</think>\n\n" if chat == "not thinking" else ""))
    for chunks, reason in outputs(FAMILIES[name]):
        found = both.ours.output_format(body, prompt)
        given = ours.stream(ours.choice(both.text, found, prompt), chunks, reason)
        wanted = await both.reference.stream(body, prompt, chunks, reason)
        assert ours.shown(given) == ours.shown(wanted), both.text.decode([n for chunk in chunks for n in chunk])


@pytest.mark.parametrize(("name", "chat"), PAIRS)
async def test_whole_replies_are_those_of_vllm(made: dict[str, Both], name: str, chat: str) -> None:
    both, body = made[name], {"messages": [{"role": "user", "content": "Hi"}], **CHATS[chat]}
    prompt = ids(PROMPT + ("<think>\n\n</think>\n\n" if chat == "not thinking" else ""))
    for chunks, reason in outputs(FAMILIES[name]):
        choice = ours.choice(both.text, both.ours.output_format(body, prompt), prompt)
        given = ours.whole(choice, chunks, reason)
        wanted = await both.reference.whole(body, prompt, chunks, reason)
        (theirs,) = wanted["choices"]
        assert ours.plain(given["message"]) == ours.plain(theirs["message"])
        assert (given["finish_reason"], given["stop_reason"]) == (theirs["finish_reason"], theirs["stop_reason"])
        details = wanted["usage"].get("completion_tokens_details")
        if details is not None:
            assert choice.reasoning_tokens == details["reasoning_tokens"]


@pytest.mark.parametrize(("name", "chat"), PAIRS)
async def test_requests_are_adjusted_as_by_vllm(made: dict[str, Both], name: str, chat: str) -> None:
    both, body = made[name], {"messages": [{"role": "user", "content": "Hi"}], **CHATS[chat]}
    prompt = ids(PROMPT)
    found = both.ours.output_format(body, prompt)
    request = await both.reference.request(body, prompt)
    asked = request.to_sampling_params(100, {})
    wanted = asked.structured_outputs
    given = found.sampling.get("structured_outputs")
    assert (given is None) == (wanted is None)
    for name_, value in (given or {}).items():
        assert getattr(wanted, name_) == value
    assert found.skip_special_tokens == asked.skip_special_tokens
    assert found.spaces_between_special_tokens == asked.spaces_between_special_tokens
