"""Incremental text: characters and stop strings that no token, and no push, holds whole."""

import threading
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ares.gateway.openai.body import BadRequestError
from ares.gateway.openai.messages import Message
from ares.gateway.openai.text import Detokenizer, TemplateError, TextModel, Truncation
from tests.gateway.running import VOCABULARY

EOS = 2


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A byte-level tokenizer with merges: tokens of several characters, and of parts of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("c", "d"), ("Ġ", "a"), ("d", "a"), ("ð", "Ł"), ("Ã", "©")]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def output(detokenizer: Detokenizer, *pushes: list[int]) -> str:
    """All text of an output that ends with the last push, or with a stop string."""
    parts = []
    for ids in pushes:
        parts.append(detokenizer.push(ids))
        if detokenizer.matched is not None:
            return "".join(parts)
    return "".join([*parts, detokenizer.finish()])


def one_by_one(ids: list[int]) -> list[list[int]]:
    return [[token] for token in ids]


@pytest.mark.parametrize("text", ["héllo", "日本語", "👩‍👩‍👧 🇩🇪!", "a\0b", "\u2028line", "ẞ" * 3])
def test_characters_split_over_tokens_and_pushes(byte_tokenizer: Tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    detokenizer = Detokenizer(byte_tokenizer, [5])
    parts = [detokenizer.push([token]) for token in ids]
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    assert detokenizer.tokens == len(ids)
    assert output(Detokenizer(byte_tokenizer, [5]), ids) == text
    assert output(Detokenizer(byte_tokenizer, [5]), ids[:2], ids[2:3], [], ids[3:]) == text


def test_half_a_character_is_not_given_out(byte_tokenizer: Tokenizer) -> None:
    first, *rest = byte_tokenizer.encode("é").ids
    detokenizer = Detokenizer(byte_tokenizer, [5])
    assert detokenizer.push([first]) == ""
    assert detokenizer.push(rest) == "é"


def test_text_after_broken_bytes(byte_tokenizer: Tokenizer) -> None:
    """A model may say any bytes: what follows them must still be shown."""
    broken = byte_tokenizer.encode("é").ids[:1] * 3
    detokenizer = Detokenizer(byte_tokenizer, [5])
    text = output(detokenizer, *one_by_one(broken), *one_by_one(byte_tokenizer.encode("hello world").ids))
    assert text.endswith("ello world")


def test_tokens_beyond_the_vocabulary_have_no_text(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("ab").ids
    detokenizer = Detokenizer(byte_tokenizer, [5])
    assert output(detokenizer, [ids[0]], [VOCABULARY + 1000], [2**32 - 1], [ids[1]]) == "ab"
    assert detokenizer.tokens == 4


def test_spacing_at_the_start_depends_on_the_prompt(words: Tokenizer) -> None:
    space = words.token_to_id("Ġa")
    assert output(Detokenizer(words, words.encode("ab").ids), [space]) == " a"
    assert output(Detokenizer(words, []), [space]) == " a"


def test_special_tokens_are_skipped_unless_wanted(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a").ids
    assert output(Detokenizer(byte_tokenizer, [5]), [*ids, EOS, *ids]) == "aa"
    assert output(Detokenizer(byte_tokenizer, [5], skip_special=False), [*ids, EOS, *ids]) == "a</s>a"


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_string_over_tokens_and_pushes(byte_tokenizer: Tokenizer, cut: int) -> None:
    ids = byte_tokenizer.encode("xx STOP yy").ids
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=("STOP",))
    assert output(detokenizer, ids[:cut], ids[cut:]) == "xx "
    assert detokenizer.matched == "STOP"
    # The tokens after the one that completed it do not count.
    assert detokenizer.tokens == len("xx STOP")


def test_what_could_become_a_stop_string_waits(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=("###",))
    shown = [detokenizer.push(byte_tokenizer.encode(text).ids) for text in ("ab", "#", "#", "c", "d")]
    assert "".join(shown) + detokenizer.finish() == "ab##cd"
    assert "#" not in "".join(shown[:3])
    assert detokenizer.finish() == ""


def test_the_stop_string_that_is_completed_first_wins(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("one two three").ids
    for stop in (("three", "two", "wo th"), ("wo th", "two")):
        detokenizer = Detokenizer(byte_tokenizer, [5], stop=stop)
        assert output(detokenizer, ids) == "one "
        assert detokenizer.matched == "two"


def test_of_stop_strings_that_one_token_completes_the_first_to_end_wins(words: Tokenizer) -> None:
    token = words.token_to_id("abc")
    detokenizer = Detokenizer(words, [5], stop=("bc", "ab", "abc"))
    assert output(detokenizer, [token]) == ""
    assert detokenizer.matched == "ab"


def test_include_stop(byte_tokenizer: Tokenizer, words: Tokenizer) -> None:
    ids = byte_tokenizer.encode("xx STOP yy").ids
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=("STOP",), include_stop=True)
    assert output(detokenizer, *one_by_one(ids)) == "xx STOP"
    # Cut inside the token that completes it.
    detokenizer = Detokenizer(words, [5], stop=("ab",), include_stop=True)
    assert output(detokenizer, [words.token_to_id("abc")]) == "ab"


def test_minimum_tokens(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("..x..x..").ids
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=("x",), minimum_tokens=3)
    assert output(detokenizer, *one_by_one(ids)) == "..x.."
    assert detokenizer.tokens == 6
    # A stop string may begin among the first tokens; it must end after them.
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=("x.",), minimum_tokens=3)
    assert output(detokenizer, *one_by_one(ids)) == ".."


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_a_stop_token_counts_and_leaves_no_text(byte_tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    ids = byte_tokenizer.encode("ab!").ids  # "!" is a stop token of the client here
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=stop)
    assert detokenizer.push(ids, stop_token=True) + detokenizer.finish() == "ab"
    assert detokenizer.tokens == 3
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=stop, include_stop=True)
    assert detokenizer.push(ids, stop_token=True) + detokenizer.finish() == "ab!"
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=stop)
    assert detokenizer.push([], stop_token=True) == ""
    assert detokenizer.tokens == 0


def test_a_stop_string_before_the_stop_token_in_one_push(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("a. b!").ids
    detokenizer = Detokenizer(byte_tokenizer, [5], stop=(".",))
    assert detokenizer.push(ids, stop_token=True) == "a"
    assert (detokenizer.matched, detokenizer.tokens) == (".", 2)


def reference(text: Tokenizer, ids: list[int], stop: list[str], minimum: int, *, include: bool) -> tuple[str, int]:
    """Decode everything, token by token, and cut at the first stop string that a token completes."""
    for count in range(1, len(ids) + 1):
        decoded = text.decode(ids[:count]).rstrip("\ufffd")
        before = text.decode(ids[: count - 1]).rstrip("\ufffd")
        if count <= minimum:
            continue
        ends = []
        for order, string in enumerate(stop):
            at = decoded.find(string, max(0, len(before) - len(string) + 1))
            if at >= 0:
                ends.append((at + len(string), order, at))
        if ends:
            end, _, start = min(ends)
            return decoded[: end if include else start], count
    return text.decode(ids), len(ids)


@settings(max_examples=300)
@given(data=st.data())
def test_any_text_in_any_pieces_with_any_stop_strings(words: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("abcd #é日👩"), min_size=1, max_size=40))
    ids = words.encode(text).ids
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    stop = data.draw(st.lists(st.text(st.sampled_from("abcd #é日"), min_size=1, max_size=4), max_size=3))
    include = data.draw(st.booleans())
    minimum = data.draw(st.integers(0, 6))
    pushes = [ids[start:end] for start, end in pairwise([0, *cuts, len(ids)])]
    detokenizer = Detokenizer(words, [5], stop=tuple(stop), include_stop=include, minimum_tokens=minimum)
    given_out = ""
    for push in pushes:
        given_out += detokenizer.push(push)
        wanted, tokens = reference(words, ids, stop, minimum, include=include)
        assert wanted.startswith(given_out)
        if detokenizer.matched is not None:
            break
    if detokenizer.matched is None:
        given_out += detokenizer.finish()
    assert given_out == wanted
    assert detokenizer.tokens == tokens
    assert (detokenizer.matched is not None) == (detokenizer.matched in stop)


def test_chat_templates(text_model: TextModel) -> None:
    messages = [Message(role="user", content="é")]
    assert text_model.decode(text_model.render_chat(messages)) == "<s>é</s><s>"
    ended = text_model.render_chat(messages, variables={"add_generation_prompt": False})
    assert text_model.decode(ended) == "<s>é</s>"
    with pytest.raises(TemplateError, match="unknown role"):
        text_model.render_chat([Message(role="nobody", content="x")])


def test_half_a_character_in_the_arguments_of_a_call(text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.a }}{% endfor %}"
    monkeypatch.setattr(text_model, "chat_template", template)
    calls = [{"function": {"name": "f", "arguments": '{"a": "\\ud83d\\ude00"}'}}]
    shown = text_model.render_chat([Message(role="assistant", tool_calls=calls)])
    assert text_model.decode(shown) == "😀"
    calls[0]["function"]["arguments"] = '{"a": "\\ud83d"}'
    with pytest.raises(TemplateError, match="surrogates"):
        text_model.render_chat([Message(role="assistant", tool_calls=calls)])


def test_other_threads_run_while_a_long_text_is_tokenised(text_model: TextModel) -> None:
    thread = threading.Thread(target=text_model.encode, args=("abc def " * 100_000,))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    # One or two where the tokenizer keeps Python's lock; hundreds where it does not.
    assert turns > 20


def with_special_start(byte_tokenizer: Tokenizer) -> Tokenizer:
    made = Tokenizer.from_str(byte_tokenizer.to_str())
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("tokens", [2, 3, 5, 6, 7, 8, 100])
def test_prompts_are_truncated_as_transformers_truncates_them(
    text_model: TextModel,
    byte_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    side: Literal["left", "right"] | None,
    special: bool,
) -> None:
    """vLLM has a tokenizer truncate on its left side where a request names none, and slices otherwise."""
    tokenizer = with_special_start(byte_tokenizer)
    monkeypatch.setattr(text_model, "tokenizer", tokenizer)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, truncation_side="left")
    made = text_model.encode("abcdef", special=special, truncation=Truncation(tokens, side))
    if side is None:
        wanted = theirs.encode("abcdef", truncation=True, max_length=tokens, add_special_tokens=special)
    else:
        wanted = theirs.encode("abcdef", add_special_tokens=special)
        wanted = wanted[-tokens:] if side == "left" else wanted[:tokens]
    assert made == wanted
    assert text_model.encode("abcdef", special=special) == theirs.encode("abcdef", add_special_tokens=special)


def test_nothing_is_left_of_a_prompt(text_model: TextModel) -> None:
    for side in (None, "left", "right"):
        assert text_model.encode("abc", truncation=Truncation(0, side)) == []
        assert Truncation(0, side).apply([1, 2]) == []


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (["a"], 1),
        (["ab", "ab", " ab"], 4),
        ([" a", "b"], 2),
        (["a"] * 3000, 1),
        (["x" * 1024], 1024),
        (["x" * 1025], None),
        (["x" * 512, "y" * 512], 1024),
        (["x" * 512, "y" * 513], None),
        ([chr(300 + number) for number in range(128)], 256),
        ([chr(300 + number) for number in range(129)], None),
    ],
)
def test_bad_words_that_would_end_an_engine(text_model: TextModel, words: list[str], tokens: int | None) -> None:
    if tokens is None:
        with pytest.raises(BadRequestError, match="VLLM_MAX_") as wrong:
            text_model.bad_words(words)
        assert wrong.value.param == "bad_words"
    else:
        assert text_model.bad_words(words) == tokens


def test_bad_words_are_counted_as_vllm_counts_them(text_model: TextModel, words: Tokenizer) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: the cpu or vllm extra")
    from vllm.sampling_params import SamplingParams

    theirs = SimpleNamespace(
        encode=lambda text, add_special_tokens: words.encode(text, add_special_tokens=add_special_tokens).ids,
        max_token_id=10**6,
    )
    text_model.tokenizer, before = words, text_model.tokenizer
    try:
        for given in (["a"], ["ab", "a", "cd"], [" a", "da", "é"], ["abc", "abd", "  a"], ["#", "a a"]):
            sampling = SamplingParams(bad_words=given)
            sampling.update_from_tokenizer(theirs)  # type: ignore[arg-type]
            assert text_model.bad_words(given) == sum(map(len, sampling.bad_words_token_ids or []))
    finally:
        text_model.tokenizer = before
