"""Recorded states in the learner's folder: taken in, checked, bounded, and indexed by output."""

import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ares.learner.cohort import Recorded
from ares.learner.files import write_whole
from ares.predictor import shards
from ares.predictor.errors import PredictorError

logger = logging.getLogger(__name__)

# The arrival number, and the beginning of the SHA-256: an instance offers a shard again where our answer was lost.
_NAME = re.compile(r"(\d{12})-([0-9a-f]{32})\.safetensors")
_DAY_S = 86400.0
OTHER_MODEL, OTHER_WIDTH, OTHER_INTERVAL = "another model", "another width", "another interval"


class UnusableError(Exception):
    """A shard cannot be learned from; the message is the reason, short enough to count by."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """Shards of what are accepted: of this model, width and interval; empty and 0: of any."""

    model: str = ""
    hidden_size: int = 0
    every: int = 0

    def check(self, source: shards.Source) -> None:
        """Raise UnusableError where a source is another one."""
        if source.sampling != shards.LIVE:
            raise UnusableError("not recorded from live requests")
        if source.hidden_state != shards.HIDDEN_STATE:
            raise UnusableError("another hidden state")
        if self.model not in ("", source.model):
            raise UnusableError(OTHER_MODEL)
        if self.hidden_size not in (0, source.hidden_size):
            raise UnusableError(OTHER_WIDTH)
        if self.every not in (0, source.every):
            raise UnusableError(OTHER_INTERVAL)


class Store:
    """The recorded shards of a folder, each under an arrival number that never decreases.

    Attributes
    ----------
    outputs
        All outputs by the id of their request.
    accepted
        What is accepted.
    dropped
        How many shards were not, by reason.
    number
        The newest arrival number.
    pruned
        The newest one whose shard has been deleted beyond the bounds since the start; 0 for none.
    """

    def __init__(self, folder: Path, accepted: Accepted, number: int) -> None:
        self._folder = folder
        self._files: dict[int, Path] = {}
        self._sizes: dict[int, int] = {}
        # When each arrived, by a clock that does not jump.
        self._times: dict[int, float] = {}
        self._requests: dict[int, list[str]] = {}
        self._names: dict[str, int] = {}
        self.outputs: dict[str, Recorded] = {}
        self.accepted = accepted
        self.dropped: Counter[str] = Counter()
        self.number = number
        self.pruned = 0
        self._undeletable = False

    def open(self) -> None:
        """Index the shards that are there; those that are not usable are deleted."""
        for path in sorted(self._folder.glob("*.safetensors")):
            found = _NAME.fullmatch(path.name)
            if found is None:
                continue
            self.number = max(self.number, int(found[1]))
            try:
                shard = self._checked(path, None)
                # The date of a file is all that is known; one in the future is that of a clock since corrected.
                age_s = max(0.0, time.time() - path.stat().st_mtime)
                self._index(int(found[1]), found[2], path, shard, age_s)
            except UnusableError as error:
                self.dropped[str(error)] += 1
                path.unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(self._sizes.values())

    def path(self, number: int) -> Path:
        """Return the file of an arrival number."""
        return self._files[number]

    def take(self, data: bytes, longest: int) -> bool:
        """Store a shard; return whether it is new and usable. Afterwards its instance may delete it in any case.

        Parameters
        ----------
        data
            The shard's file; one that is there already is not stored twice.
        longest
            The most tokens that a request of this instance can have (max_model_len).

        Raises
        ------
        OSError
            It cannot be written, for example because the disk is full: it is to be asked for again.
        """
        name = hashlib.sha256(data).hexdigest()[:32]
        if name in self._names:
            return False
        number = self.number + 1
        path = self._folder / f"{number:012d}-{name}.safetensors"
        write_whole(path, data)
        self.number = number
        try:
            shard = self._checked(path, longest)
        except UnusableError as error:
            self.dropped[str(error)] += 1
            path.unlink(missing_ok=True)
            return False
        self._index(number, name, path, shard)
        return True

    def prune(self, keep_bytes: int, keep_days: float, used: Container[int] = ()) -> int:
        """Delete the oldest shards beyond these bounds, but none in use; return how many."""
        now = time.monotonic()
        size, deleted = self.size, 0
        for number in sorted(self._files):
            if size <= keep_bytes and now - self._times[number] <= keep_days * _DAY_S:
                continue
            if number not in used:
                size -= self._sizes[number]
                self._forget(number)
                self.pruned = max(self.pruned, number)
                deleted += 1
        return deleted

    def check_again(self, numbers: Iterable[int]) -> int:
        """Forget those of these shards that have been damaged or deleted since; return how many."""
        lost = 0
        for number in numbers:
            if number not in self._files:
                continue
            try:
                self._checked(self._files[number], None)
            except UnusableError as error:
                self.dropped[str(error)] += 1
                self._forget(number)
                lost += 1
        return lost

    def _checked(self, path: Path, longest: int | None) -> shards.Shard:
        try:
            shard = shards.read(path)
        except PredictorError as error:
            raise UnusableError("not finite" if "not finite" in str(error) else "malformed") from error
        except Exception as error:  # whatever is wrong with one file, the others are learned from
            logger.exception("%s cannot be read, and is dropped", path.name)
            raise UnusableError("malformed") from error
        source = shard.source
        self.accepted.check(source)
        _check_lengths(shard, longest)
        # Only now: one that is dropped does not decide what others must be.
        if not self.accepted.every:
            self.accepted = Accepted(source.model, source.hidden_size, source.every)
        return shard

    def _index(self, number: int, name: str, path: Path, shard: shards.Shard, age_s: float = 0.0) -> None:
        self._files[number], self._sizes[number] = path, path.stat().st_size
        self._times[number] = time.monotonic() - age_s
        self._names[name] = number
        self._requests[number] = shard.requests
        now = time.monotonic()
        pairs = Counter(shard.tensors["output"].tolist())
        lengths = shard.tensors["output_length"].tolist()
        for row, request in enumerate(shard.requests):
            output = self.outputs.setdefault(request, Recorded(request, shard.prompts[row], number, number, now))
            output.add(number, lengths[row], shard.outcomes[row], pairs[row], now)

    def _forget(self, number: int) -> None:
        try:
            self._files.pop(number).unlink(missing_ok=True)
        except OSError as error:
            if not self._undeletable:
                logger.warning("recorded states cannot be deleted, and are kept beyond their bounds: %s", error)
            self._undeletable = True
        del self._sizes[number], self._times[number]
        self._names = {name: one for name, one in self._names.items() if one != number}
        for request in self._requests.pop(number):
            output = self.outputs.get(request)
            if output is not None and output.forget(number):
                del self.outputs[request]


def _check_lengths(shard: shards.Shard, longest: int | None) -> None:
    """Raise UnusableError where lengths cannot be; `longest` is the context of the instance, None where unknown."""
    # Live requests are recorded with the context of their instance as the limit.
    context = shard.source.limit
    if longest is not None and context > longest:
        raise UnusableError("a limit beyond the model's context")
    tensors = shard.tensors
    # In 64 bits: the sum of two lengths may not fit 32. A request may have one token more than the context.
    total = tensors["prompt_length"].astype(np.int64) + tensors["output_length"]
    if (total > context + 1).any() or any(limit > context + 1 for limit in shard.limits):
        raise UnusableError("longer than the model's context")
    if (tensors["position"] > tensors["output_length"][tensors["output"]]).any():
        raise UnusableError("a position after the end")
