"""The checkpoint: one safetensors file with the network and the model that it belongs to."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ares import __version__
from ares.predictor.errors import PredictorError
from ares.predictor.networks import HazardNetwork, PaperNetwork

FORMAT = "1"
ARCHITECTURES = ("ours", "paper")
# Far above the sizes of training: building a network of any claimed size could take long.
_LARGEST = {"members": 256, "bins": 4096, "first": 256}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained network and what it was trained for.

    Attributes
    ----------
    arch
        ``ours`` or ``paper``.
    options
        Arguments of its constructor besides the hidden size.
    center, scale
        [d] mean and standard deviation of the training set's states.
    """

    network: Any
    arch: str
    options: dict[str, Any]
    model: str
    hidden_size: int
    hidden_state: str
    every: int
    limit: int
    center: torch.Tensor
    scale: torch.Tensor

    def check(self, model: str, hidden_size: int, hidden_state: str) -> None:
        """Raise PredictorError with every difference where it does not fit."""
        pairs = {
            "model": (self.model, model),
            "hidden size": (self.hidden_size, hidden_size),
            "hidden state": (self.hidden_state, hidden_state),
        }
        wrong = [f"{name} {ours}, here {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
        if wrong:
            raise PredictorError(f"the predictor was trained for {'; '.join(wrong)}")


def build(arch: str, hidden_size: int, options: dict[str, Any]) -> Any:
    """Return a fresh network; PredictorError for an unknown architecture."""
    if arch == "ours":
        return HazardNetwork(hidden_size, **options)
    if arch == "paper":
        return PaperNetwork(hidden_size)
    raise PredictorError(f"unknown architecture {arch!r}: {' or '.join(ARCHITECTURES)}")


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all; weights in half precision."""
    from safetensors.torch import save as serialise

    tensors = {f"network.{name}": t.contiguous() for name, t in checkpoint.network.state_dict().items()}
    tensors = {n: t.half() if t.dim() == 2 else t for n, t in tensors.items()}
    tensors |= {"center": checkpoint.center, "scale": checkpoint.scale}
    fields = {name: str(getattr(checkpoint, name)) for name in ("arch", "model", "hidden_size", "every", "limit")}
    described = fields | {
        "format": FORMAT,
        "tap": checkpoint.hidden_state,
        "options": json.dumps(checkpoint.options),
        "ares": __version__,
    }
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(serialise(tensors, described))
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise PredictorError(f"{path}: cannot be written: {error}") from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    PredictorError
        It is missing, truncated, not a checkpoint, of another version, or holds values that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            described = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise PredictorError(f"{path}: not a whole checkpoint: {error}") from error
    if described.get("format") != FORMAT:
        raise PredictorError(
            f"{path}: checkpoint format {described.get('format')}, this version reads {FORMAT}; train it again"
        )
    try:
        hidden_size = int(described["hidden_size"])
        options = json.loads(described["options"])
        _check(hidden_size, options, tensors)
        # On the meta device: sizes in a file take no memory until its tensors have been checked against them.
        with torch.device("meta"):
            network = build(described["arch"], hidden_size, options)
        states = {n.removeprefix("network."): t.float() for n, t in tensors.items() if n.startswith("network.")}
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise ValueError("weights that are not finite")
        network.load_state_dict(states, assign=True)
        every, limit = int(described["every"]), int(described["limit"])
        if min(every, limit) < 1:
            raise ValueError("every and limit must be positive")
        checkpoint = Checkpoint(
            network=network.eval(),
            arch=described["arch"],
            options=options,
            model=described["model"],
            hidden_size=hidden_size,
            hidden_state=described["tap"],
            every=every,
            limit=limit,
            center=tensors["center"].float(),
            scale=tensors["scale"].float(),
        )
    except (PredictorError, LookupError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise PredictorError(f"{path}: malformed: {error}") from error
    return checkpoint


def _check(hidden_size: int, options: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for sizes that no checkpoint has."""
    for name in ("center", "scale"):
        if tensors[name].shape != (hidden_size,):
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, the hidden size is {hidden_size}")
    wrong = [n for n in options if not (isinstance(options[n], int) and 0 < options[n] <= _LARGEST.get(n, 1 << 31))]
    if wrong:
        raise ValueError(f"options {', '.join(wrong)} out of range")
