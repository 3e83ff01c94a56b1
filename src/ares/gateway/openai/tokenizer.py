"""The model's tokenizer, from a process of its own.

A vocabulary that is read as JSON leaves a lot of memory behind, and what only transformers can load
(`tokenizer_files.OtherTokenizerError`) takes more than all the rest of a gateway: with torch, which it imports where
that is installed, three times as much. So a process of its own loads the tokenizer, writes it out, and ends.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ares.gateway.openai import tokenizer_files
from ares.gateway.openai.tokenizer_files import ModelTokenizer, OtherTokenizerError
from ares.models.cache import ModelError
from ares.models.resolve import resolve


def tokenizer_folder(name: str) -> Path:
    """Return the local folder of a tokenizer, a folder or a Hugging Face id; ModelError where there is none."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else resolve(name, weights=False)


def load(folder: Path) -> ModelTokenizer:
    """Load the tokenizer of a model folder.

    Raises
    ------
    ModelError
        It is broken, it has no form that the tokenizers library runs, or only transformers, which is not installed, can
        load it.
    """
    command = [sys.executable, "-m", __name__, str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)  # noqa: S603 - ours
    head, _, state = done.stdout.partition(b"\n")
    if done.returncode or not head:
        raise ModelError(f"{folder}: the process that loads its tokenizer ended with status {done.returncode}")
    described = json.loads(head)
    if "error" in described:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {described['error']}")
    # A tokenizer with Python code of its own cannot be written out: transformers then stays in this process.
    tokenizer = Tokenizer.from_buffer(state) if state else _load(folder).tokenizer
    tokenizer.encode_special_tokens = described["encode_special_tokens"]
    return ModelTokenizer(tokenizer, described["chat_template"], described["special_tokens"])


def from_transformers(folder: Path) -> Any:
    """Load the tokenizer of a model folder with transformers, in this process."""
    # Without torch, transformers warns that it can load no models; none is wanted here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def as_text(tokenizer: Tokenizer) -> str:
    """Return a tokenizer as text that makes the same one again; empty where there is no such text."""
    try:
        state = tokenizer.to_str()
        again = Tokenizer.from_str(state)
    except Exception:  # the library raises no class of its own
        return ""
    same = again.to_str() == state and again.get_vocab() == tokenizer.get_vocab()
    return state if same else ""


def _describe(folder: Path) -> tuple[dict[str, Any], str]:
    """Return what `load` reads: the head, and the tokenizer."""
    try:
        made = _load(folder)
        head = {
            "chat_template": made.chat_template,
            "special_tokens": made.special_tokens,
            # The one setting that the text of a tokenizer leaves out.
            "encode_special_tokens": made.tokenizer.encode_special_tokens,
        }
        return head, as_text(made.tokenizer)
    except ModelError as error:
        return {"error": str(error)}, ""
    except Exception as error:  # a folder can make the libraries raise anything
        return {"error": f"{type(error).__name__}: {error}"}, ""


def _load(folder: Path) -> ModelTokenizer:
    try:
        return tokenizer_files.read(folder)
    except OtherTokenizerError as error:
        if importlib.util.find_spec("transformers") is None:
            raise ModelError(
                f"{error}, and transformers, which may load it, is missing: pip install transformers"
            ) from error
    loaded = from_transformers(folder)
    if not isinstance(getattr(loaded, "backend_tokenizer", None), Tokenizer):
        raise ModelError(f"{type(loaded).__name__} has no form that the tokenizers library runs")
    return ModelTokenizer(loaded.backend_tokenizer, loaded.chat_template, loaded.special_tokens_map)


def _main(folder: Path) -> None:
    # Tokenizers need no torch, and transformers starts in a third of the time where it finds none.
    sys.modules["torch"] = None  # type: ignore[assignment]
    # Output that a library prints must not get in between.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        head, state = _describe(folder)
        out.write(json.dumps(head).encode() + b"\n" + state.encode())


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
