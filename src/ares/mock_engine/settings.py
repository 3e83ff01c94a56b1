"""Settings of a mock engine: `ares worker --simulate PROFILE` takes these flags in place of vLLM's."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from ares.engine.identity import served_names
from ares.mock_engine.batch import Policy
from ares.protocol.messages import Role
from ares.simulator.profile import Profile, load_profile

# Longest sequence unless the flag or the KV capacity sets less.
_MAX_MODEL_LEN = 32768


class FlagError(ValueError):
    """A flag that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How mock engines behave.

    Attributes
    ----------
    profile
        Step-time model, memory and bandwidth.
    model
        Name in the replies.
    kv_blocks
        KV capacity.
    max_model_len
        Tokens of the longest sequence.
    speed
        How much faster than real time steps and transfers are.
    policy
        Scheduling policy: which request waits and which is preempted.
    prediction_error
        Sigma of the mock predictor; None predicts nothing.
    mean_output, output_sigma
        The outputs' own lengths: mean in tokens, and standard deviation of their logarithm.
    lease_s
        For how long KV is pinned, in real time.
    names
        Names of the model; by default `model` alone.
    folder
        The model's folder, with its configuration; None without one.
    prefix_caching
        Whether it keeps the blocks of prompts and outputs, and publishes KV events (prefix_cache.py).
    """

    profile: Profile
    model: str
    kv_blocks: int
    max_model_len: int
    speed: float = 1.0
    policy: Policy = "fcfs"
    prediction_error: float | None = 0.0
    mean_output: float = 400.0
    output_sigma: float = 1.0
    lease_s: float = 30.0
    names: tuple[str, ...] = ()
    folder: Path | None = None
    prefix_caching: bool = False


@dataclass(frozen=True, slots=True)
class Identity:
    """Name, first role, addresses: `host` is listened on, `advertise_host` (or else `host`) published.

    With `fixed_role` it keeps that role.
    """

    name: str
    role: Role
    host: str
    port: int
    control_port: int
    advertise_host: str = ""
    fixed_role: bool = False

    @property
    def published_host(self) -> str:
        """Name or address by which gateways and other instances reach it."""
        return self.advertise_host or self.host


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message} (the flags of a mock engine: ares worker --simulate PROFILE -- --help)")


def parse(profile: str, model: str, flags: list[str]) -> tuple[EngineSettings, int]:
    """Return the settings and the number of instances.

    Raises
    ------
    FlagError, ProfileError
        A flag or the profile cannot be used.
    """
    given = _parser().parse_args(flags)
    loaded = load_profile(profile)
    changes = {
        name: getattr(given, name) for name in ("max_num_seqs", "max_num_batched_tokens") if getattr(given, name)
    }
    loaded = loaded.model_copy(update=changes)
    blocks = (given.kv_tokens or loaded.kv_tokens) // loaded.block_size
    longest = min(given.max_model_len or _MAX_MODEL_LEN, blocks * loaded.block_size)
    if longest < 2:
        raise FlagError(f"--kv-tokens {given.kv_tokens}: less than one block of {loaded.block_size}")
    if given.max_model_len and given.max_model_len > longest:
        raise FlagError(f"--max-model-len {given.max_model_len} is above the KV capacity of {longest} tokens")
    names = given.served_model_name or [model]
    settings = EngineSettings(
        profile=loaded,
        model=names[0],
        kv_blocks=blocks,
        max_model_len=longest,
        speed=given.speed,
        policy=cast(Policy, given.scheduling_policy),
        prediction_error=given.prediction_error,
        mean_output=given.mean_output,
        output_sigma=given.output_sigma,
        lease_s=given.lease,
        names=tuple(served_names(names, model)),
        prefix_caching=given.enable_prefix_caching,
    )
    return settings, given.instances


def _parser() -> _Parser:
    parser = _Parser(prog="ares worker --simulate PROFILE", allow_abbrev=False, description=__doc__)
    add = parser.add_argument
    add("--instances", type=_count, default=1, help="instances in this process, on consecutive ports")
    add("--speed", type=_positive, default=1.0, help="how much faster than real time steps and transfers are")
    add("--kv-tokens", type=_count, help="KV capacity; by default the profile's")
    add("--max-model-len", type=_count, help=f"longest sequence; by default {_MAX_MODEL_LEN}, or what fits")
    add("--max-num-seqs", type=_count, help="most running requests; by default the profile's")
    add("--max-num-batched-tokens", type=_count, help="most tokens of a step; by default the profile's")
    add("--scheduling-policy", choices=("fcfs", "priority"), default="priority", help="as vLLM's")
    add("--mean-output", type=_positive, default=400.0, help="mean of the outputs' own lengths, in tokens")
    add("--output-sigma", type=_sigma, default=1.0, help="standard deviation of their logarithm")
    add("--prediction-error", type=_error, default=0.0, help="sigma of the mock predictor, 0 exact; or none")
    add("--enable-prefix-caching", action="store_true", help="keep the KV blocks of prompts and outputs for others")
    add("--lease", type=_positive, default=30.0, help="seconds for which KV stays pinned")
    add("--served-model-name", nargs="+", help="names of the model, the first in the replies; by default --model")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value < 1 << 40:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e12:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _sigma(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 10")
    return value


def _error(text: str) -> float | None:
    return None if text == "none" else _sigma(text)
