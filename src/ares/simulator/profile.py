"""Profiles: what one engine on one accelerator does, as a small JSON file made by `ares simulate calibrate`."""

import json
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ares.text_files import TextFileError, read_text


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file and the setting."""


# Numbers below this are exact in the simulator's doubles.
_MOST = 1 << 53
_CONFIG = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class StepTimeModel(BaseModel):
    """Seconds of one engine step: base + the sum of the rest, each times its count."""

    model_config = _CONFIG

    base_s: float = Field(gt=0)
    """A step whatever its batch: reading the weights, kernel launches, scheduling."""
    per_request_s: float = Field(ge=0)
    """For each decoding request."""
    per_resident_token_s: float = Field(ge=0)
    """For each token of KV attended to by decoding requests."""
    per_prefill_token_s: float = Field(ge=0)
    """For each prompt token computed."""
    per_prefill_context_s: float = Field(default=0.0, ge=0)
    """For each pair of a prompt token computed and a token before it."""

    def row(self) -> list[float]:
        """Return the five numbers in the order of the simulator's columns."""
        return [
            self.base_s,
            self.per_request_s,
            self.per_resident_token_s,
            self.per_prefill_token_s,
            self.per_prefill_context_s,
        ]


class Hardware(BaseModel):
    """Published figures of the accelerators of one engine, summed over them; for scaling a profile."""

    model_config = _CONFIG

    name: str
    memory_bytes_s: float = Field(gt=0)
    flops: float = Field(gt=0)


class Profile(BaseModel):
    """One decode or prefill engine."""

    model_config = _CONFIG

    name: str
    model: str
    source: str
    """How the numbers were found."""
    kv_tokens: int = Field(gt=0, lt=_MOST)
    kv_bytes_per_token: int = Field(gt=0, lt=_MOST)
    block_size: int = Field(default=16, gt=0, lt=_MOST)
    max_num_seqs: int = Field(default=256, gt=0, lt=_MOST)
    max_num_batched_tokens: int = Field(default=2048, gt=0, lt=_MOST)
    watermark: float = Field(default=0.0, ge=0, lt=1)
    """Share of the blocks that admission leaves free while anything runs."""
    step: StepTimeModel
    start_delay_s: float = Field(default=0.0, ge=0)
    """From a request's arrival to its place in the engine's queue."""
    bandwidth_bytes_s: float = Field(default=1.25e10, gt=0)
    """KV transfer between two instances."""
    latency_s: float = Field(default=0.005, ge=0)
    """Of each transfer, besides its bytes."""
    stall_s: float = Field(default=0.05, ge=0)
    """Pause of a migrated request between its last token at the source and its first step at the target."""
    weight_bytes: float = Field(default=0.0, ge=0)
    hardware: Hardware | None = None


def profile_names() -> list[str]:
    """Return the names of the profiles that ship with the package."""
    return sorted(
        entry.name.removesuffix(".json")
        for entry in files("ares.simulator.profiles").iterdir()
        if entry.name.endswith(".json")
    )


def load_profile(name_or_file: str) -> Profile:
    """Load a shipped profile by name or any profile by path; ProfileError names what is wrong."""
    if name_or_file in profile_names():
        where = f"profile {name_or_file}"
        text = files("ares.simulator.profiles").joinpath(f"{name_or_file}.json").read_text(encoding="utf-8")
    else:
        where = name_or_file
        try:
            text = read_text(Path(name_or_file))
        except TextFileError as error:
            known = ", ".join(profile_names())
            raise ProfileError(f"{where}: no such profile or file ({error}); shipped profiles: {known}") from None
    try:
        return Profile.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise ProfileError(f"{where}:{error.lineno}: not JSON: {error.msg}") from None
    except ValidationError as error:  # a ValueError too
        first = error.errors()[0]
        setting = ".".join(str(part) for part in first["loc"])
        raise ProfileError(f"{where}: {setting}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists within lists within lists
        raise ProfileError(f"{where}: not JSON: {error}") from None
