"""A model from the Hugging Face hub, or from the cache of the hub's client."""

import fnmatch
import json
import queue
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ares.models.cache import ModelError, publish, report, staging_folder

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

# The hub's client is imported where it is used: a cached model does not need it.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_TEMPLATES = "additional_chat_templates/*.jinja"
_WEIGHTS = ".safetensors"
# A tokenizer is one of these files; a snapshot without any is not whole.
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
_TIMEOUT_S = 8.0


class HubError(Exception):
    """The hub did not give the model: `why`, in one line, and in the message also what to do."""

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(f"{why}. {advice}")
        self.why = why


def from_hub(model: str, folder: Path, console: Console, *, weights: bool) -> None:
    """Download a model's files, without the weights if they are not needed, and publish them as this folder.

    Raises
    ------
    HubError
        The hub did not give the model.
    ModelError
        The model has a form that is not supported, or arrived damaged.
    """
    import huggingface_hub

    info = _ask_hub(model)
    wanted = {file.rfilename: file for file in info.siblings or [] if _is_wanted(file.rfilename)}
    if "config.json" not in wanted or (weights and not any(name.endswith(_WEIGHTS) for name in wanted)):
        what = "config.json with *.safetensors" if weights else "config.json"
        raise ModelError(
            f"{model} has no {what} on the hub. Choose a repository that has {'both' if weights else 'it'}."
        )
    if not weights:
        wanted = {name: file for name, file in wanted.items() if not name.endswith(_WEIGHTS)}
    # Named after the commit, so that an interrupted download resumes and never mixes two commits.
    staging = staging_folder(folder, f"{info.sha}")
    what = model if weights else f"the tokenizer of {model}"
    report(console, f"Fetching {what} from the Hugging Face hub.")
    try:
        huggingface_hub.snapshot_download(
            model,
            revision=info.sha,
            local_dir=staging,
            allow_patterns=list(wanted),
            etag_timeout=_TIMEOUT_S,
        )
    except Exception as error:
        raise _hub_error(error) from error
    if missing := [name for name in wanted if not (staging / name).is_file()]:
        raise HubError(f"The hub did not deliver {missing[0]}", "Start again to resume the download.")
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the client's bookkeeping
    expected = {name: file.lfs.sha256 for name, file in wanted.items() if file.lfs}
    publish(staging, folder, f"hub {info.sha}", expected)


def _is_wanted(name: str) -> bool:
    if fnmatch.fnmatch(name, _TEMPLATES):
        return True
    # Subfolders hold other formats (onnx/, original/); consolidated* is a second copy of the weights.
    if "/" in name or name.startswith("consolidated"):
        return False
    return any(fnmatch.fnmatch(name, pattern) for pattern in _FILES)


def _ask_hub(model: str) -> "ModelInfo":
    """List the model's files in one quick call, before anything that retries."""
    from huggingface_hub import HfApi

    answers: queue.Queue[ModelInfo | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(HfApi().model_info(model, timeout=_TIMEOUT_S, files_metadata=True))
        except Exception as error:
            answers.put(error)

    # A thread, because the call's own timeout covers neither a silent name server nor several addresses in turn.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_TIMEOUT_S)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {_TIMEOUT_S:.0f} s")
    if isinstance(answer, Exception):
        raise _hub_error(answer) from answer
    return answer


def _hub_error(error: Exception) -> HubError:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    local = "or give a local folder"
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set", f"Unset it {local}.")
    if isinstance(error, GatedRepoError):
        return HubError("The model is gated", f"Accept its terms there and log in (`hf auth login`), {local}.")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            "The hub has no such model, or it is private", f"Check the id, log in (`hf auth login`), {local}."
        )
    # By attribute: the classes of HTTP errors depend on the HTTP library of the installed huggingface_hub.
    if status := getattr(getattr(error, "response", None), "status_code", None):
        return HubError(f"The hub answered with status {status}", f"Try again later {local}.")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return HubError(f"The Hugging Face hub cannot be reached ({reason})", f"Check the connection {local}.")


def from_client_cache(model: str, *, weights: bool) -> Path | None:
    """Return the snapshot that another tool left in huggingface_hub's own cache, if it has all that is needed.

    It is the one that ``refs/main`` names, as for every other user of that cache; the hub is not asked.
    """
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(model, local_files_only=True, allow_patterns="config.json"))
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else ()
    except Exception:  # absent or unusable
        return None
    needed = ["config.json", "tokenizer_config.json", *((shards or ["model.safetensors"]) if weights else [])]
    if not all((folder / name).is_file() for name in needed):
        return None
    return folder if any(any(folder.glob(pattern)) for pattern in _TOKENIZERS) else None
