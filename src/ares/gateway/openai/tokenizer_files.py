"""A tokenizer and its chat template from a model's files, as transformers (5.19) makes them, without transformers.

Sources: tokenization_utils_base.py (``_from_pretrained``), tokenization_utils_tokenizers.py. What is not read here,
such as a tokenizer without ``tokenizer.json``, raises `OtherTokenizerError`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from ares.gateway.openai.tokenizer_classes import (
    MISTRAL,
    PLAIN,
    REBUILDING,
    Merges,
    OtherTokenizerError,
    TokenizerClass,
    Vocabulary,
    class_name,
    table,
)

__all__ = ["ModelTokenizer", "OtherTokenizerError", "read"]

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# Settings by which transformers takes other files, or changes the tokenizer in yet another way.
_OTHERWISE = ("fast_tokenizer_files", "init_inputs", "fix_mistral_regex")

Token = str | AddedToken


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A tokenizer, and its chat template with its variables.

    Attributes
    ----------
    chat_template
        Jinja source, or several by name; None where the model has none.
    special_tokens
        Variables of the template: ``bos_token`` and so on.
    """

    tokenizer: Tokenizer
    chat_template: str | dict[str, str] | None
    special_tokens: dict[str, Any]


def read(folder: Path) -> ModelTokenizer:
    """Read the tokenizer of a model folder.

    Raises
    ------
    OtherTokenizerError
        It takes transformers to load it.
    ValueError
        A file is broken.
    OSError
        A file cannot be read.
    """
    model, settings = _object(folder / "config.json"), _object(folder / "tokenizer_config.json", optional=True)
    if not (folder / "tokenizer.json").is_file():
        raise OtherTokenizerError("it has no tokenizer.json")
    name = class_name(str(folder), model, settings)
    if table()["classes"].get(model.get("model_type")) == MISTRAL and (folder / "tekken.json").is_file():
        raise OtherTokenizerError("it has a tekken.json")
    if otherwise := [setting for setting in _OTHERWISE if settings.get(setting)]:
        raise OtherTokenizerError(f"its tokenizer_config.json sets {otherwise[0]}")
    if name != PLAIN and name not in REBUILDING:
        raise OtherTokenizerError(f"its tokenizer is a {name}")
    settings = _converted(settings)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    explicit = _explicit(settings)
    added = _added_tokens(folder, settings)
    by_text = {str(token): token for token in added.values()}
    for key in _NAMED:
        if settings.get(key) is not None:
            settings[key] = by_text.get(str(settings[key]), settings[key])
    if name == PLAIN:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        named, extra = _special_tokens(settings, explicit, {})
        _finish(tokenizer, added, named, extra, settings)
    else:
        rebuilt = REBUILDING[name]
        named, extra = _special_tokens(settings, explicit, rebuilt.special_tokens)
        tokenizer = _rebuilt(folder, rebuilt, added, named, extra, settings)
    return ModelTokenizer(tokenizer, _chat_template(folder, settings), {key: str(v) for key, v in named.items()})


def _object(file: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not file.is_file():
        return {}
    try:
        read = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return read


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | dict[str, str] | None:
    """Return the template, or all of them by name: files before the setting."""
    found = {}
    if (file := folder / "chat_template.jinja").is_file():
        found["default"] = file.read_text(encoding="utf-8")
    for file in (folder / "additional_chat_templates").glob("*.jinja"):
        found[file.stem] = file.read_text(encoding="utf-8")
    if found:
        return found["default"] if [*found] == ["default"] else found
    given: Any = settings.get("chat_template")
    if isinstance(given, list):
        return {template["name"]: template["template"] for template in given}
    one: str | dict[str, str] | None = given
    return one


def _converted(value: Any) -> Any:
    """Make added tokens of the objects that say that they are some."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return AddedToken(**{key: part for key, part in value.items() if key != "__type"})
        return {key: _converted(part) for key, part in value.items()}
    return [_converted(part) for part in value] if isinstance(value, list) else value


def _explicit(settings: dict[str, Any]) -> dict[str, Token]:
    """Take the model's own named tokens out of the settings; those of older files come before a list of all."""
    listed = settings.pop("model_specific_special_tokens", None) or {}
    if not isinstance(listed, dict):
        raise OtherTokenizerError("its model_specific_special_tokens are no object")
    found = {
        key: settings.pop(key)
        for key in list(settings)
        if key not in _NAMED and key.endswith("_token") and isinstance(settings[key], str)
    }
    if isinstance(settings.get("extra_special_tokens"), dict):
        found |= settings.pop("extra_special_tokens")
    return found or listed


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens by id, and put what older files say of special tokens into the settings."""
    if "added_tokens_decoder" in settings:
        given = settings["added_tokens_decoder"]
        return {int(token): AddedToken(**said) if isinstance(said, dict) else said for token, said in given.items()}
    for key, said in _object(folder / "special_tokens_map.json", optional=True).items():
        if key == "extra_special_tokens":
            raise OtherTokenizerError(f"its special_tokens_map.json sets {key}")
        settings[key] = AddedToken(**said | {"special": True}) if isinstance(said, dict) else said
    special = {str(settings[key]) for key in _NAMED if settings.get(key)}
    special |= {str(token) for token in settings.get("extra_special_tokens") or ()}
    added = {
        token: AddedToken(text, rstrip=False, lstrip=False, normalized=text not in special, special=text in special)
        for text, token in _object(folder / "added_tokens.json", optional=True).items()
    }
    for said in _object(folder / "tokenizer.json")["added_tokens"]:
        added[said["id"]] = AddedToken(**{name: part for name, part in said.items() if name != "id"})
    return added


def _special_tokens(
    settings: dict[str, Any], explicit: dict[str, Token], defaults: Any
) -> tuple[dict[str, Token], list[Token]]:
    """Return the named special tokens, and the others."""
    if "additional_special_tokens" in settings and "extra_special_tokens" not in settings:
        settings["extra_special_tokens"] = settings["additional_special_tokens"]
    standard = {key: settings.get(key, defaults.get(key)) for key in _NAMED}
    own = {
        key: value
        for key, value in settings.items()
        if key not in _NAMED and key.endswith("_token") and isinstance(value, Token)
    }
    named = {key: token for key, token in (standard | own | explicit).items() if token is not None}
    extra = settings.get("extra_special_tokens") or []
    for token in (*named.values(), *extra):
        if not isinstance(token, Token):
            raise OtherTokenizerError(f"{token!r} is among its special tokens")
    return named, extra


def _rebuilt(
    folder: Path,
    rebuilt: TokenizerClass,
    added: dict[int, AddedToken],
    named: dict[str, Token],
    extra: list[Token],
    settings: dict[str, Any],
) -> Tokenizer:
    file = _object(folder / "tokenizer.json")
    vocabulary, merges = _vocabulary(file["model"])
    tokenizer = rebuilt.build(vocabulary, merges, {key: str(token) for key, token in named.items()}, settings)
    # The settings around the vocabulary, as the library reads them.
    file["model"] |= {"vocab": {}, "merges": []}
    around = Tokenizer.from_str(json.dumps(file | {"added_tokens": []}))
    if around.post_processor is not None:
        tokenizer.post_processor = around.post_processor
    if around.truncation is not None:
        tokenizer.enable_truncation(**around.truncation)
    if around.padding is not None:
        tokenizer.enable_padding(**around.padding)
    _finish(tokenizer, added, named, extra, settings)
    if not rebuilt.keeps_post_processor:
        tokenizer.post_processor = _nothing_added()
    again = list(dict.fromkeys(str(token) for token in (*named.values(), *extra)))
    if rebuilt.adds_again == "plain":
        tokenizer.add_tokens([AddedToken(token, special=True) for token in again])
    elif rebuilt.adds_again == "special":
        tokens = (*named.values(), *extra)
        made = [AddedToken(t, special=True, normalized=False) if isinstance(t, str) else t for t in tokens]
        tokenizer.add_special_tokens(made)
    return tokenizer


def _vocabulary(model: dict[str, Any]) -> tuple[Vocabulary, Merges]:
    if model.get("type") != "BPE":
        raise OtherTokenizerError(f"its tokenizer.json holds a model of type {model.get('type')}")
    given = model.get("vocab")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    if not isinstance(given, dict):
        raise OtherTokenizerError("the vocabulary of its tokenizer.json is a list")
    return given, [(left, right) for left, right in pairs]


def _finish(
    tokenizer: Tokenizer,
    added: dict[int, AddedToken],
    named: dict[str, Token],
    extra: list[Token],
    settings: dict[str, Any],
) -> None:
    """Add the tokens that the files name, in the order of transformers, and set what is said of their use."""
    padding = tokenizer.padding
    if padding is not None:
        named.setdefault("pad_token", padding["pad_token"])
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    wanted: list[Token] = [token for _, token in sorted(added.items())]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()} | {str(t) for t in wanted}
    for token in _in_order(named, extra):
        if str(token) not in known and token not in wanted:
            wanted.append(token)
    names = {str(token) for token in named.values()}
    for token in wanted:
        if isinstance(token, AddedToken) and str(token) in names:
            token.special = True
    if wanted:
        tokenizer.add_tokens([AddedToken(t, special=True) if isinstance(t, str) else t for t in wanted])
    if tokenizer.post_processor is None:
        tokenizer.post_processor = _nothing_added()


def _in_order(named: dict[str, Token], extra: list[Token]) -> Iterable[Token]:
    yield from (named[key] for key in _NAMED if key in named)
    yield from (token for key, token in named.items() if key not in _NAMED)
    yield from extra


def _nothing_added() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
