"""Tokenizer classes of transformers (5.19): which one a model has, and those that make a tokenizer anew.

Most models have the tokenizer of their ``tokenizer.json`` (`PLAIN`). Some classes take only its vocabulary, merges and
post-processor, and set the rest by themselves; those of models that vLLM generates with are here (`REBUILDING`).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

PLAIN = "TokenizersBackend"
MISTRAL = "MistralCommonBackend"
_PLAIN_NAMES = frozenset({PLAIN, MISTRAL, "PreTrainedTokenizer", "PythonBackend", "BloomTokenizer"})
# Models whose files name a wrong class (tokenization_auto.py, MODEL_IDS_TO_TOKENIZERS_BACKEND).
_PLAIN_MODELS = ("deepseek-ai/deepseek-r1-distill-llama-*", "deepseek-ai/deepseek-coder-*")

Vocabulary = dict[str, int]
Merges = list[tuple[str, str]]


class OtherTokenizerError(ValueError):
    """Only transformers can load this tokenizer; the message says why."""


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """A class that makes a tokenizer anew.

    Attributes
    ----------
    build
        Makes it of vocabulary, merges, special tokens and the settings of ``tokenizer_config.json``.
    special_tokens
        Named special tokens where the model names none.
    adds_again
        How it adds its special tokens a second time: as other tokens, as special ones, or not at all.
    keeps_post_processor
        Whether it has the post-processor of ``tokenizer.json``.
    """

    build: Callable[[Vocabulary, Merges, Mapping[str, str], Mapping[str, Any]], Tokenizer]
    special_tokens: Mapping[str, str]
    adds_again: Literal["", "plain", "special"] = ""
    keeps_post_processor: bool = True


@cache
def table() -> dict[str, Any]:
    """Return what `python -m ares_dev tokenizer-classes` has read of transformers."""
    read: dict[str, Any] = json.loads(files(__package__).joinpath("tokenizer_classes.json").read_text())
    return read


def class_name(folder: str, model: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the tokenizer class that transformers chooses (AutoTokenizer.from_pretrained).

    Parameters
    ----------
    folder
        The model's folder, whose name may say which model it is.
    model, settings
        Its ``config.json`` and ``tokenizer_config.json``.

    Raises
    ------
    OtherTokenizerError
        It is Python code of the model.
    """
    path = folder.lower().replace("--", "/")
    code = settings.get("auto_map")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    if not code and any(fnmatch(path, f"*/{name}") for name in _PLAIN_MODELS):
        return PLAIN
    classes, wrongly_named, names = (table()[name] for name in ("classes", "wrongly_named", "names"))
    kind = model.get("model_type")
    registered = classes.get(kind)
    named = settings.get("tokenizer_class") or model.get("tokenizer_class")
    wanted = named.removesuffix("Fast") if isinstance(named, str) else None
    if code and kind not in wrongly_named and registered is None and wanted not in names:
        raise OtherTokenizerError("its tokenizer is Python code of the model")
    if wanted is None:
        chosen = registered or PLAIN
    elif registered is None or code or registered == wanted:
        chosen = wanted
    elif registered in _PLAIN_NAMES:
        chosen = PLAIN
    else:
        chosen = registered if kind in wrongly_named or model.get("model_name") in wrongly_named else wanted
    return PLAIN if chosen in _PLAIN_NAMES or chosen not in names else chosen


def _byte_level(vocabulary: Vocabulary, merges: Merges, **settings: Any) -> Tokenizer:
    options: dict[str, Any] = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
    made = Tokenizer(BPE(vocab=vocabulary, merges=merges, dropout=None, **options, **settings))
    made.decoder = decoders.ByteLevel()
    return made


def _llama(vocabulary: Vocabulary, merges: Merges, _: Mapping[str, str], settings: Mapping[str, Any]) -> Tokenizer:
    given = settings.get("add_prefix_space")
    prefix = True if given is None else bool(given)
    scheme = ("always" if settings.get("legacy", False) else "first") if prefix else "never"
    made = Tokenizer(BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True, dropout=None))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return made


def _qwen(word: str, letters: str) -> Callable[[Vocabulary, Merges, Mapping[str, str], Mapping[str, Any]], Tokenizer]:
    """Return how Qwen's tokenizers are built: regular expressions of a word, and of what is in none."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{word}+|\p{{N}}| ?[^\s{letters}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def build(vocabulary: Vocabulary, merges: Merges, _: Mapping[str, str], settings: Mapping[str, Any]) -> Tokenizer:
        made = _byte_level(vocabulary, merges, unk_token=None, byte_fallback=False)
        made.normalizer = normalizers.NFC()
        prefix = bool(settings.get("add_prefix_space") or False)
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
        )
        return made

    return build


def _gpt2(vocabulary: Vocabulary, merges: Merges, _: Mapping[str, str], settings: Mapping[str, Any]) -> Tokenizer:
    made = _byte_level(vocabulary, merges)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    return made


def _gpt_neox(vocabulary: Vocabulary, merges: Merges, _: Mapping[str, str], settings: Mapping[str, Any]) -> Tokenizer:
    made = _byte_level(vocabulary, merges)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=settings.get("add_prefix_space", False), trim_offsets=settings.get("trim_offsets", True)
    )
    return made


def _cohere(vocabulary: Vocabulary, merges: Merges, _: Mapping[str, str], settings: Mapping[str, Any]) -> Tokenizer:
    made = _byte_level(vocabulary, merges)
    prefix = settings.get("add_prefix_space", False)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(prefix, trim_offsets=True)]
    )
    return made


def _gemma(vocabulary: Vocabulary, merges: Merges, special: Mapping[str, str], _: Mapping[str, Any]) -> Tokenizer:
    made = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            fuse_unk=True,
            unk_token=special["unk_token"],
            dropout=None,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _named(**tokens: str) -> dict[str, str]:
    return {f"{name}_token": token for name, token in tokens.items()}


_END = "<|endoftext|>"
REBUILDING = {
    "CohereTokenizer": TokenizerClass(
        _cohere,
        _named(bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", unk="<UNK>", sep="<SEP>", pad="<PAD>", cls="<CLS>")
        | _named(mask="<MASK_TOKEN>"),
        adds_again="special",
    ),
    "GemmaTokenizer": TokenizerClass(_gemma, _named(bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>", mask="<mask>")),
    "GPT2Tokenizer": TokenizerClass(_gpt2, _named(bos=_END, eos=_END, unk=_END)),
    "GPTNeoXTokenizer": TokenizerClass(
        _gpt_neox, _named(bos=_END, eos=_END, unk=_END, pad="<|padding|>"), keeps_post_processor=False
    ),
    "LlamaTokenizer": TokenizerClass(_llama, _named(bos="<s>", eos="</s>", unk="<unk>")),
    "Qwen2Tokenizer": TokenizerClass(
        _qwen(r"\p{L}", r"\p{L}"), _named(eos=_END, unk=_END, pad=_END), adds_again="plain"
    ),
    "Qwen3_5Tokenizer": TokenizerClass(_qwen(r"[\p{L}\p{M}]", r"\p{L}\p{M}"), _named(eos=_END, unk=_END, pad=_END)),
}
"""By the name that the model's files have."""
