"""Looked-up text of tokens is what incremental decoding gives, push by push."""

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ares.gateway.openai.text import Detokenizer, UnspacedDetokenizer
from ares.gateway.openai.token_texts import TokenTexts

SPECIAL = ("<unk>", "<s>", "</s>")
WORDS = ("▁", "▁▁", "▁▁▁", "▁the", "▁a", "a", "é", "▁日", "日本", "\n", "b▁", "x▁▁y", "\ufffd", "<0x", "👩‍👩‍👧")
BLANKS = ("  ", " ", "")
BYTES = tuple(f"<0x{n:02X}>" for n in range(256))


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (*SPECIAL, "<|end|>")])
    tokenizer.add_tokens(["<tool>", " spaced ", "日<x>"])
    return tokenizer


def byte_level() -> Tokenizer:
    """Tokens of several characters, and of parts of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "a"), ("ð", "Ł"), ("Ã", "©"), ("©", "a"), ("a", "Ã"), ("Ġ", "Ġ")]
    tokens = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    return with_added(tokenizer)


def sentence_piece(decoder: decoders.Decoder) -> Tokenizer:
    """Blanks as letters, bytes for characters without a token."""
    vocabulary = {token: n for n, token in enumerate((*SPECIAL, *BYTES, *WORDS, *BLANKS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoder
    return with_added(tokenizer)


def llama() -> Tokenizer:
    strip = decoders.Strip(" ", 1, 0)
    return sentence_piece(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    )


def gemma() -> Tokenizer:
    return sentence_piece(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))


def metaspace() -> Tokenizer:
    return sentence_piece(decoders.Metaspace())


def metaspace_never() -> Tokenizer:
    return sentence_piece(decoders.Metaspace(prepend_scheme="never"))


def sequences(tokenizer: Tokenizer, count: int = 300) -> list[list[int]]:
    """Random tokens; runs of one kind, so that bytes make characters, and ids that there are not."""
    draw = random.Random(7)
    size = tokenizer.get_vocab_size()
    characters = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("é", "日本", "a b", "👩", "the a")]
    pieces = [
        lambda: [draw.randrange(size)],
        lambda: [draw.randrange(size)] * 2,
        lambda: draw.choice(characters),
        lambda: draw.choice(characters)[:1],
        lambda: [draw.randrange(max(0, size - 30), size)],
        lambda: [draw.choice((size, size + 7, 1 << 31, 1 << 40, 1 << 70))],
    ]
    return [
        [token for _ in range(30) for token in draw.choices(pieces, weights=(8, 2, 3, 1, 3, 0.3))[0]()]
        for _ in range(count)
    ]


def detokenizer(tokenizer: Tokenizer, prompt: list[int], kind: int, texts: TokenTexts | None) -> Detokenizer:
    """One of four kinds."""
    if kind == 0:
        return UnspacedDetokenizer(tokenizer, prompt, texts=texts)
    if kind == 1:
        return Detokenizer(tokenizer, prompt, stop=("日a", "the", "\n"), texts=texts)
    return Detokenizer(tokenizer, prompt, skip_special=kind == 2, texts=texts)


@pytest.mark.parametrize("make", [byte_level, llama, gemma, metaspace, metaspace_never])
def test_texts_are_those_of_incremental_decoding(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    texts = TokenTexts.of(tokenizer)
    assert texts is not None
    looked_up = 0
    for number, ids in enumerate(sequences(tokenizer)):
        prompt = [token for token in ids[: number % 4] if token < tokenizer.get_vocab_size()]
        decoded, found = (detokenizer(tokenizer, prompt, number % 4, given) for given in (None, texts))
        alone = number % 3 == 0
        for token in ids:
            text = (alone and found.push_known(token)) or found.push([token])
            assert text == decoded.push([token]), (ids, token)
            assert (found.matched, found.tokens) == (decoded.matched, decoded.tokens)
            looked_up += bool(texts[token])
            if found.matched is not None:
                break
        assert found.finish() == decoded.finish()
    assert looked_up > 1000
    assert all(token < tokenizer.get_vocab_size() for token in texts)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder("</w>"),
        decoders.CTC(),
        decoders.Strip(" ", 2, 0),
        decoders.Strip(" ", 0, 1),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("  ", " ")]),
    ],
)
def test_decoders_that_join_tokens_in_other_ways(decoder: decoders.Decoder | None) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        tokenizer.decoder = decoder
    assert TokenTexts.of(tokenizer) is None


def test_parts_of_characters_and_added_tokens_depend_on_their_context() -> None:
    tokenizer = byte_level()
    texts = TokenTexts.of(tokenizer)
    assert texts is not None
    shown = {"Ã": "", "©a": "", "<tool>": "", "<s>": "", "<|end|>": "", "Ã©": "é", "Ġa": " a"}
    assert {token: texts[tokenizer.get_vocab()[token]] for token in shown} == shown
