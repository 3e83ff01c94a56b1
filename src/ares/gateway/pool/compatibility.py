"""Which instances are alike: the settings that decide the bytes of their KV and their tokens, compared in one place.

Requests go from one instance to another only where these agree: a move, the KV of a prefill, and the tokens of a
request whose instance was lost. What an instance does not report (one of an earlier version, a mock engine) counts as
equal. vLLM's version is not among them: where it differs, NIXL's own handshake fails, and the KV is computed again.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Flag, auto

from ares.protocol import messages

# Methods of speculative decoding that have no KV of their own.
_WITHOUT_KV = {"medusa", "mlp_speculator", "ngram", "ngram_gpu", "off", "suffix"}


class Decides(Flag):
    """What a setting decides."""

    KV = auto()
    """The bytes of KV: where only these differ, a request can go on from its tokens."""
    TOKENS = auto()
    """The tokens themselves."""
    DRAWS = auto()
    """The tokens of a request with a seed."""


ALL = Decides.KV | Decides.TOKENS | Decides.DRAWS


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that instances are compared by.

    Attributes
    ----------
    name
        How messages call it.
    decides
        What it decides.
    read
        Returns an instance's value; empty where it is not known.
    flag
        The flag of vLLM that sets it, or what else does.
    """

    name: str
    decides: Decides
    read: Callable[[messages.Hello], str]
    flag: str


def _reported(name: str) -> Callable[[messages.Hello], str]:
    return lambda hello: hello.configuration.get(name, "")


def _drafts(hello: messages.Hello) -> str:
    method = hello.configuration.get("speculative_decoding", "")
    return "no drafts with KV" if method in _WITHOUT_KV else method


def _groups(hello: messages.Hello) -> str:
    return "; ".join(f"{g.block_size} tokens, window {g.window}, fixed {g.fixed_blocks}" for g in hello.kv_groups)


def _attention(hello: messages.Hello) -> str:
    backend = hello.configuration.get("attention_backend", "")
    return "" if backend == "auto" else backend  # which one that is, only the workers know


SETTINGS = (
    Setting("data type", Decides.TOKENS, _reported("dtype"), "--dtype"),
    Setting("KV cache data type", Decides.TOKENS, _reported("kv_cache_dtype"), "--kv-cache-dtype"),
    Setting(
        "KV layers that keep the data type", Decides.TOKENS, _reported("kv_unquantized"), "--kv-cache-dtype-skip-layers"
    ),
    Setting("quantisation", Decides.TOKENS, _reported("quantization"), "--quantization, --quantization-config"),
    Setting("model configuration", Decides.TOKENS, _reported("model_configuration"), "config.json, --hf-overrides"),
    Setting("weights", Decides.TOKENS, _reported("weights"), "the files of the model"),
    Setting("sliding windows", Decides.TOKENS, _reported("sliding_windows"), "--disable-sliding-window"),
    Setting(
        "state data type", Decides.TOKENS, _reported("state_dtype"), "--mamba-cache-dtype, --mamba-ssm-cache-dtype"
    ),
    Setting("watermark", Decides.TOKENS, _reported("watermark"), "--watermark-config"),
    Setting("KV block size", Decides.KV, lambda hello: str(hello.block_size), "--block-size"),
    Setting("KV groups", Decides.KV, _groups, "--disable-hybrid-kv-cache-manager, drafts"),
    Setting("attention backend", Decides.KV, _attention, "--attention-backend"),
    Setting("drafts", Decides.KV, _drafts, "--speculative-config"),
    Setting("model runner", Decides.DRAWS, _reported("model_runner"), "VLLM_USE_V2_MODEL_RUNNER"),
    Setting("random noise", Decides.DRAWS, _reported("noise"), "--use-fp64-gumbel"),
)
Values = tuple[str, ...]
"""An instance's values of `SETTINGS`."""


def values(hello: messages.Hello) -> Values:
    """Return the settings that an instance reports; the same object for equal ones, so that comparing is quick."""
    return _interned(tuple(setting.read(hello) for setting in SETTINGS))


@functools.lru_cache(maxsize=1024)
def _interned(settings: Values) -> Values:
    return settings


def difference(one: Values | None, other: Values | None, decides: Decides = ALL) -> str | None:
    """Name the settings in which two instances differ, with both values; None where they are alike.

    Parameters
    ----------
    one, other
        Their settings; None: not known, which differs from nothing.
    decides
        What the settings that count decide.
    """
    if one is other or one is None or other is None:
        return None
    found = [
        f"{setting.name} ({mine}, {theirs} there: {setting.flag})"
        for setting, mine, theirs in zip(SETTINGS, one, other, strict=True)
        if mine != theirs and mine and theirs and setting.decides & decides
    ]
    return ", ".join(found) or None


def largest_alike(known: Iterable[Values | None]) -> Values | None:
    """Return the settings that most instances are alike with, of equally many the first; None where none is known."""
    counts = Counter(each for each in known if each is not None)
    if len(counts) < 2:
        return next(iter(counts), None)
    return max(counts, key=lambda one: sum(n for other, n in counts.items() if difference(one, other) is None))
