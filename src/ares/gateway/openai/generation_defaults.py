"""Sampling parameters that a model, or its operator, sets for requests that set none (vLLM's config/model.py, 0.32)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

_PARAMETERS = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p"),
    "max_new_tokens",
)


class GenerationConfigError(ValueError):
    """The defaults that an operator names cannot be read."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds for requests that do not set it.

    Attributes
    ----------
    parameters
        Sampling parameters by name.
    maximum_tokens
        Limit of an output whose request sets none; None: as much as fits.
    cap
        Limit of every output; None: none.
    """

    parameters: dict[str, Any] = field(default_factory=dict)
    maximum_tokens: int | None = None
    cap: int | None = None

    def limit(self, asked: int | None, room: int) -> int:
        """Return the most output tokens of a request that asks for `asked`, or sets no limit (None)."""
        wanted = asked if asked is not None else self.maximum_tokens
        return min(value for value in (room, wanted, self.cap) if value is not None)


def load(folder: Path, source: str = "auto", override: dict[str, Any] | None = None) -> GenerationDefaults:
    """Read the defaults.

    Parameters
    ----------
    folder
        The model's folder.
    source
        vLLM's ``--generation-config``: ``auto`` (the model's own), ``vllm`` (none) or a folder.
    override
        vLLM's ``--override-generation-config``.

    Raises
    ------
    GenerationConfigError
        The folder has no ``generation_config.json``.
    """
    override = override or {}
    own = source in ("auto", "vllm")
    read = {} if source == "vllm" else _read(folder if own else Path(source).expanduser(), needed=not own)
    known = {name: value for name, value in (read | override).items() if name in _PARAMETERS and value is not None}
    maximum = known.pop("max_new_tokens", None)
    # A model's own limit is for requests without one; an operator's holds for all of them.
    return GenerationDefaults(known, maximum, override.get("max_new_tokens") if own else maximum)


def _read(folder: Path, *, needed: bool) -> dict[str, Any]:
    try:
        read: dict[str, Any] = msgspec.json.decode((folder / "generation_config.json").read_bytes(), type=dict)
    except (OSError, msgspec.DecodeError) as error:
        if needed:
            raise GenerationConfigError(
                f"generation_config {folder}: give auto, vllm, or a folder with a generation_config.json ({error})"
            ) from error
        return {}
    return read
