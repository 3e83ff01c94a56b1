"""Tokenizers read from files are those of transformers, for every class and every place that tokens come from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from ares.gateway.openai import tokenizer_classes, tokenizer_files
from ares.gateway.openai.tokenizer_files import OtherTokenizerError
from ares_dev import tokenizer_classes as developers

TEXTS = [
    *("", "Hello  world\n", " é日👩 <s>x</s>", "a<unk>b ab abc", "\u00a0tab\tx", "<|endoftext|>a<s> </s> <|end|> b"),
    *("It's 1234.5 people's\r\n\r\n  x ", "नमस्ते दुनिया e\u0301", "▁a <pad><mask> <BOS_TOKEN>"),
]
CORPUS = [f"hello world {n} it's the quick brown fox's é日 नमस्ते\n  x y" for n in range(60)]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|endoftext|>", "<bos>"]


def trained(*, byte_level: bool) -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=not byte_level))
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = []
    special = SPECIAL if byte_level else [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    start = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[start])
    if not byte_level:  # bytes are no special tokens
        state = json.loads(made.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
        made = Tokenizer.from_str(json.dumps(state))
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    made = {}
    for byte_level in (False, True):
        made[byte_level] = tmp_path_factory.mktemp("trained")
        trained(byte_level=byte_level).save(str(made[byte_level] / "tokenizer.json"))
    return made


def token(text: str, **flags: bool) -> dict[str, Any]:
    given = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": False}
    return {"content": text, **given, **flags}


SETTINGS: dict[str, dict[str, Any]] = {
    "names alone": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None},
    "defaults": {},
    "new tokens": {"eos_token": "<|end|>", "extra_special_tokens": ["<|tool|>", "ab"], "image_token": "<|img|>"},
    "named by the model": {"extra_special_tokens": {"boi_token": "<boi>", "x_token": "</s>"}, "sep_token": "</s>"},
    "decoder": {
        "added_tokens_decoder": {
            "701": token("<|end|>", special=True, rstrip=True),
            "700": token(" x"),
            "1": token("<s>", special=True, lstrip=True),
        },
        "eos_token": "<|end|>",
        "additional_special_tokens": ["<|end|>", "<|more|>"],
    },
    "objects": {
        "bos_token": {"__type": "AddedToken", **token("<s>", normalized=True)},
        "unk_token": {"__type": "AddedToken", **token("<new>", lstrip=True)},
    },
    "as text": {"split_special_tokens": True, "add_prefix_space": True, "legacy": True, "trim_offsets": False},
    "beginnings": {"add_bos_token": True, "add_eos_token": True, "add_prefix_space": False, "legacy": None},
    "a list of all": {"model_specific_special_tokens": {"audio_token": "<a>", "eot_token": "</s>"}},
    "a list of all, and others": {"model_specific_special_tokens": {"audio_token": "<a>"}, "image_token": "<i>"},
    "two lists": {"additional_special_tokens": ["<a>"], "extra_special_tokens": ["<b>"], "clean_up": True},
}
NAMES = [*tokenizer_classes.REBUILDING, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "NoSuchTokenizer"]


def write(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(value))


def outputs(tokenizer: Tokenizer) -> list[tuple[list[int], str, str] | str]:
    """Return ids and their text, with and without special tokens, or the error."""
    found: list[tuple[list[int], str, str] | str] = []
    for text in TEXTS:
        for special in (True, False):
            try:
                ids = tokenizer.encode(text, add_special_tokens=special).ids
            except Exception as error:  # of a model without its unknown token
                found.append(str(error))
            else:
                found.append((ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)))
    return found


def same(folder: Path) -> None:
    """What is read is what transformers makes."""
    wanted = AutoTokenizer.from_pretrained(str(folder))
    made = tokenizer_files.read(folder)
    theirs: Tokenizer = wanted.backend_tokenizer
    assert made.chat_template == wanted.chat_template
    assert made.special_tokens == wanted.special_tokens_map
    assert json.loads(made.tokenizer.to_str()) == json.loads(theirs.to_str())
    assert made.tokenizer.encode_special_tokens == theirs.encode_special_tokens
    assert outputs(made.tokenizer) == outputs(theirs)


@pytest.fixture
def model(folders: dict[bool, Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(folders[True], tmp_path / "model"))
    write(folder, "config.json", {"model_type": "llama"})
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_classes(folders: dict[bool, Path], tmp_path: Path, name: str) -> None:
    for byte_level, trained_folder in folders.items():
        for what, settings in SETTINGS.items():
            folder = Path(shutil.copytree(trained_folder, tmp_path / f"{byte_level} {what}"))
            write(folder, "config.json", {"model_type": "llama"})
            write(folder, "tokenizer_config.json", {"tokenizer_class": name, **settings})
            same(folder)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saves(model: Path, tmp_path: Path, name: str) -> None:
    write(model, "tokenizer_config.json", {"tokenizer_class": name, **SETTINGS["new tokens"], "chat_template": "t"})
    AutoTokenizer.from_pretrained(str(model)).save_pretrained(str(tmp_path / "saved"))
    shutil.copy(model / "config.json", tmp_path / "saved")
    same(tmp_path / "saved")


@pytest.mark.parametrize(
    "kind", ["qwen2", "qwen3", "qwen3_5", "gpt2", "gemma3_text", "mistral", "phi3", "mamba", "new", ""]
)
@pytest.mark.parametrize("named", [None, "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_the_class_by_model_type(model: Path, kind: str, named: str | None) -> None:
    write(model, "config.json", {"model_type": kind})
    write(model, "tokenizer_config.json", {"tokenizer_class": named} if named else {})
    same(model)


def test_older_files(model: Path) -> None:
    write(model, "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"})
    bos = token("<s>", lstrip=True)
    write(
        model, "special_tokens_map.json", {"bos_token": bos, "pad_token": "<new>", "additional_special_tokens": ["q"]}
    )
    write(model, "added_tokens.json", {"<|end|>": 700, "plain": 701})
    same(model)


def test_truncation_and_padding(model: Path) -> None:
    saved = Tokenizer.from_file(str(model / "tokenizer.json"))
    saved.enable_truncation(5, stride=1, direction="left")
    saved.enable_padding(pad_token="<pad>", pad_id=3, direction="left")
    saved.post_processor = None  # type: ignore[assignment]
    saved.add_tokens([AddedToken("fox", single_word=True)])
    saved.save(str(model / "tokenizer.json"))
    for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):
        write(model, "tokenizer_config.json", {"tokenizer_class": name})
        same(model)


@pytest.mark.parametrize("others", [{}, {"default": "second"}, {"rag": "r", "tool_use": "t"}])
@pytest.mark.parametrize("default", [None, "from a file"])
def test_templates(model: Path, others: dict[str, str], default: str | None) -> None:
    write(model, "tokenizer_config.json", {"chat_template": "from the settings"})
    if default is not None:
        (model / "chat_template.jinja").write_text(default)
    for name, template in others.items():
        (model / "additional_chat_templates").mkdir(exist_ok=True)
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    same(model)


def test_models_whose_files_name_a_wrong_class(folders: dict[bool, Path], tmp_path: Path) -> None:
    """By its id, transformers takes the tokenizer of the file; here the id is in the folder's name."""
    folder = tmp_path / "models--deepseek-ai--DeepSeek-R1-Distill-Llama-8B" / "snapshots" / "0a1b"
    shutil.copytree(folders[True], folder)
    write(folder, "config.json", {"model_type": "llama"})
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast"})
    made = tokenizer_files.read(folder)
    assert (
        made.tokenizer.encode("hello world").ids
        == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("hello world").ids
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokenizer_class": "BertTokenizer"}, "its tokenizer is a BertTokenizer"),
        ({"auto_map": {"AutoTokenizer": ["t.T", None]}, "tokenizer_class": "MyTokenizer"}, "Python code of the model"),
        ({"fix_mistral_regex": True}, "its tokenizer_config.json sets fix_mistral_regex"),
        ({"extra_special_tokens": [{"content": "x"}]}, "is among its special tokens"),
    ],
)
def test_what_only_transformers_loads(model: Path, change: dict[str, Any], why: str) -> None:
    write(model, "tokenizer_config.json", change)
    with pytest.raises(OtherTokenizerError, match=why):
        tokenizer_files.read(model)


def test_no_tokenizer_json(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(OtherTokenizerError, match=r"no tokenizer\.json"):
        tokenizer_files.read(model)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_broken_files(model: Path, content: str) -> None:
    (model / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not"):
        tokenizer_files.read(model)


def test_the_table_is_that_of_transformers() -> None:
    table = tokenizer_classes.table()
    if transformers.__version__ != table["transformers"]:
        pytest.skip(f"transformers {transformers.__version__} is installed")
    assert table == developers.table()
