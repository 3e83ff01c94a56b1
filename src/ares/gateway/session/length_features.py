"""What is known of a request before its first token, as far as it says something of its output's length."""

import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ares.gateway.openai.sampling import Sampling
from ares.policy.length_cells import PREFIXES, request_keys

# Equal prompts have the same keys within a process only: the keys tell nothing of a prompt to who can read them.
_SECRET = os.urandom(32)


@dataclass(eq=False, slots=True)
class LengthFeatures:
    """Keys of a request's length cells (policy/length_cells.py), and what `LengthHistory` keeps of them.

    Attributes
    ----------
    keys
        From the general to the particular; empty where nothing is known.
    curve
        The curve that was composed for them last.
    cells_version
        The version of the cells by which `curve` was found.
    """

    keys: tuple[int, ...] = ()
    curve: Any = None
    cells_version: int = field(default=-1)


def length_features(prompt: list[int], sampling: Sampling) -> LengthFeatures:
    """Return what is known of a request.

    Beginnings of prompts are equal only under the same adapter and cache salt, as in vLLM's prefix cache
    (v1/core/kv_cache_utils.py, `generate_block_hash_extra_keys`, 0.32).
    """
    begun = hashlib.blake2b(repr((sampling.adapter, sampling.cache_salt)).encode(), digest_size=8, key=_SECRET)
    templates, start = [], 0
    for end in PREFIXES:
        begun.update(np.array(prompt[start:end], np.int64).tobytes())
        templates.append(int.from_bytes(begun.digest()))
        start = end
        if len(prompt) <= end:
            break
    return LengthFeatures(request_keys(len(prompt), templates))
