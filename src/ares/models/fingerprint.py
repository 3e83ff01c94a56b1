"""What tells two models apart that go by one name: a digest of the configuration, and one of samples of the weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

# Lines of config.json that do not change what a model computes, or are reported by themselves.
_NOT_THE_MODEL = ("_name_or_path", "dtype", "torch_dtype", "transformers_version")
# The formats of weights, of which vLLM loads the first that is there (model_executor/model_loader, 0.32).
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SAMPLES = 64
_SAMPLE_BYTES = 512
_DIGITS = 16


def of_configuration(folder: Path, overrides: Any = None) -> str:
    """Return a digest of a model's config.json and of what overrides it; empty where it cannot be read."""
    try:
        read = json.loads((folder / "config.json").read_bytes())
        kept = {name: value for name, value in read.items() if name not in _NOT_THE_MODEL}
        text = json.dumps([kept, overrides or {}], sort_keys=True, default=str)
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    return _digest(text.encode())


def of_weights(folder: Path) -> str:
    """Return a digest of the sizes of a model's files of weights, and of samples of each; empty where there is none.

    It tells revisions, fine-tuned and quantised copies apart in milliseconds, however large they are. Copies whose
    files are cut in another way count as different.
    """
    digest = hashlib.sha256()
    try:
        files = next((found for kind in _WEIGHTS if (found := sorted(folder.glob(kind)))), [])
        for path in files:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                for sample in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError:
        return ""
    return digest.hexdigest()[:_DIGITS] if files else ""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGITS]
