"""The text of tokens in log probabilities: it joins to the text of the output, and is vLLM's."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ares.gateway.openai.logprobs import LogprobsRenderer
from ares.gateway.openai.text import TextModel
from ares.gateway.pool.delta import PositionLogprobs, TokenLogprob

CHARACTERS = "🦜🧡 naïve — 漢字 👩‍👩‍👧 é\n\t  x ñ𝄞"


def positions(ids: list[int], alternatives: list[list[int]] | None = None) -> list[PositionLogprobs]:
    """Return positions of these tokens, each with itself and its alternatives as candidates."""
    rows = alternatives or [[] for _ in ids]
    return [
        PositionLogprobs(one, -1.0, [TokenLogprob(token, -1.0 - at) for at, token in enumerate([one, *row])])
        for one, row in zip(ids, rows, strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2, 100])
def test_the_bytes_of_a_chat_join_to_its_text(text_model: TextModel, count: int) -> None:
    ids = text_model.encode(CHARACTERS)
    renderer = LogprobsRenderer(text_model, 0, chat=True)
    parts = [ids[at : at + count] for at in range(0, len(ids), count)]
    entries = [entry for part in parts for entry in renderer.render(positions(part))["content"]]
    assert len(entries) == len(ids)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == CHARACTERS
    assert "".join(entry["token"] for entry in entries) == CHARACTERS


def test_the_offsets_of_a_text_are_those_of_its_tokens(text_model: TextModel) -> None:
    ids = text_model.encode(CHARACTERS)
    found = LogprobsRenderer(text_model, 0, chat=False).render(positions(ids))
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert CHARACTERS[offset : offset + len(token)] == token


def test_a_token_named_by_its_id_keeps_its_bytes(text_model: TextModel) -> None:
    (token,) = text_model.encode("a")
    (entry,) = LogprobsRenderer(text_model, 1, chat=True, as_ids=True).render(positions([token]))["content"]
    assert (entry["token"], entry["bytes"]) == (f"token_id:{token}", [97])


def test_a_token_keeps_the_space_at_its_start(model_folder: Path, tmp_path: Path) -> None:
    text = "two  words here"
    metaspace = Tokenizer(models.BPE())
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    metaspace.train_from_iterator([text] * 3, trainers.BpeTrainer(show_progress=False))
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    metaspace.save(str(folder / "tokenizer.json"))
    text_model = TextModel(folder)
    ids = text_model.encode(text, special=False)
    assert "".join(text_model.decode([token]) for token in ids) != f" {text}"
    assert "".join(map(text_model.token, ids)) == f" {text}"


@pytest.mark.parametrize("seed", range(20))
def test_texts_are_those_of_vllm(text_model: TextModel, model_folder: Path, seed: int) -> None:
    logprobs = pytest.importorskip("vllm.v1.engine.logprobs", reason="needs vLLM: the cpu or vllm extra")
    import numpy as np
    from transformers import AutoTokenizer

    served_tokenizer = AutoTokenizer.from_pretrained(str(model_folder))

    generator = random.Random(seed)
    characters = text_model.encode(CHARACTERS)
    ids = [
        generator.choice(characters) if generator.random() < 0.7 else generator.randrange(len(served_tokenizer))
        for _ in range(40)
    ]
    alternatives = [[generator.choice(characters) for _ in range(2)] for _ in ids]
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(
            num_logprobs=2, num_prompt_logprobs=None, logprobs=2, prompt_logprobs=None, flat_logprobs=False
        )
    )
    processor = logprobs.LogprobsProcessor.from_new_request(served_tokenizer, request)
    expected = []
    for one, row in zip(ids, alternatives, strict=True):
        tokens = np.array([[one, *row]])
        output = SimpleNamespace(
            new_logprobs=(tokens, -np.arange(1.0, 4.0)[None], np.array([1]), None),
            new_prompt_logprobs_tensors=None,
            prompt_token_id_logprobs=None,
        )
        processor.update_from_output(output)
        expected.append([processor.logprobs[-1][int(token)].decoded_token for token in tokens[0]])
    entries = LogprobsRenderer(text_model, 3, chat=True).render(positions(ids, alternatives))["content"]
    assert [[top["token"] for top in entry["top_logprobs"]] for entry in entries] == expected
    assert [entry["token"] for entry in entries] == [row[0] for row in expected]


@pytest.mark.parametrize(
    ("count", "sampled", "listed"),
    [(2, -1.0, 2), (2, -1.5, 2), (2, -5.0, 3), (1, -0.5, 1), (0, -5.0, 1), (-1, -5.0, 4)],
)
def test_a_text_lists_the_sampled_token_beside_the_likeliest(
    text_model: TextModel, count: int, sampled: float, listed: int
) -> None:
    # As an instance gives them that is asked for one more: the sampled token, then the likeliest of the others.
    others = [TokenLogprob(20 + at, -1.25 - at) for at in range(3)]
    given = [TokenLogprob(7, sampled), *others][: count + 1 if count > 0 else 1 if count == 0 else None]
    renderer = LogprobsRenderer(text_model, count, chat=False, as_ids=True)
    found = renderer.render([PositionLogprobs(7, sampled, given)])
    assert len(found["top_logprobs"][0]) == listed
    assert found["top_logprobs"][0]["token_id:7"] == sampled
