"""The mock model: reproducible by anyone, and every slip changes all tokens after it."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from ares.mock_engine.model import VocabularyError, fold, load, unfold
from tests.mock_engine.cluster import MODEL

PROMPT = [11, 12, 13]


def test_a_continuation_can_be_continued_anywhere() -> None:
    whole = MODEL.continuation(PROMPT, 50)
    for cut in (1, 16, 17, 49):
        assert whole[:cut] + MODEL.continuation(PROMPT + whole[:cut], 50 - cut) == whole


def test_every_token_changes_what_follows() -> None:
    prompt = list(range(20, 40))
    usual = MODEL.continuation(prompt, 8)
    lost = [prompt[:n] + prompt[n + 1 :] for n in range(20)]
    doubled = [prompt[: n + 1] + prompt[n:] for n in range(20)]
    swapped = [[*prompt[:n], prompt[n + 1], prompt[n], *prompt[n + 2 :]] for n in range(19)]
    assert all(MODEL.continuation(other, 8) != usual for other in itertools.chain(lost, doubled, swapped))


def test_a_state_can_be_taken_back() -> None:
    assert unfold(fold([5, 6, 7]), 7) == fold([5, 6])
    assert fold([7], fold([5, 6])) == fold([5, 6, 7])


def test_outputs_end_with_the_stop_token_at_the_length_that_the_prompt_says() -> None:
    lengths = [MODEL.output_tokens(fold([n])) for n in range(2000)]
    assert 320 < statistics.mean(lengths) < 480
    assert max(lengths) > 5 * statistics.median(lengths)
    short = next(n for n in range(2000) if 5 < lengths[n] < 50)
    output = MODEL.output([short], 1000)
    assert len(output) == lengths[short]
    assert output == [*MODEL.continuation([short], lengths[short] - 1), MODEL.stop]
    assert MODEL.output([short], 3) == MODEL.continuation([short], 3)


def tokenizer_folder(folder: Path, *words: str) -> Path:
    vocabulary = {token: n for n, token in enumerate(["</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "</s>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_it_writes_plain_words_of_the_real_tokenizer(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path, " house", "\n", "42", "ü", "tree", " a b")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [0, 4]}))
    model = load(folder, mean_output=50.0)
    assert (model.ids, model.stop, model.vocabulary, model.mean_output) == ((1, 5), 0, 7, 50.0)


def test_a_folder_that_says_too_little_is_named(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"tokenizer\.json cannot be read"):
        load(tmp_path)
    tokenizer_folder(tmp_path, "word")
    with pytest.raises(VocabularyError, match="stops an output"):
        load(tmp_path)
    tokenizer_folder(tmp_path, "42")
    with pytest.raises(VocabularyError, match="plain word"):
        load(tmp_path)
