"""Checkpoints that were not trained: networks with random weights."""

import torch

from ares.predictor.checkpoint import Checkpoint
from ares.predictor.networks import HazardNetwork
from ares.predictor.shards import HIDDEN_STATE


def random_checkpoint(model: str, hidden_size: int, *, seed: int = 0, every: int = 20, first: int = 0) -> Checkpoint:
    """Return a checkpoint for a model; each seed gives another one."""
    torch.manual_seed(seed)
    options = {"limit": 256, "members": 1, "width": 16} | ({"first": first} if first else {})
    network = HazardNetwork(hidden_size, **options).eval()
    torch.nn.init.normal_(network.members[0].shift.weight, 0, 0.5)
    if network.first is not None:
        torch.nn.init.normal_(network.first.members[0].shift.weight, 0, 0.5)
    center, scale = torch.zeros(hidden_size), torch.ones(hidden_size)
    return Checkpoint(network, "ours", options, model, hidden_size, HIDDEN_STATE, every, 256, center, scale)
