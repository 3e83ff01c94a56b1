"""A distribution over remaining tokens as discrete hazards: the chance to end in each bin, once it is reached.

Bins are the remaining tokens [edge k, edge k+1), as wide as one token at first and growing geometrically. A censored
output is only known to be longer than its bins, and its likelihood is the probability of that. Within a bin all lengths
are equally likely; after the last edge the hazard per token stays that of the last bin.
"""

import torch
from torch.nn.functional import logsigmoid, softplus

# Middle of 20 equal parts of probability; the 10th and 11th frame the median, the 18th and 19th the 90th percentile.
LEVELS = tuple((n + 0.5) / 20 for n in range(20))


def edges(limit: int, bins: int = 32) -> torch.Tensor:
    """Return the bins' edges, [at most bins + 1] float32: 1, 2, 3, ... and then growing up to limit + 1."""
    # On the CPU whatever the default device is: the sizes of the network depend on the numbers.
    largest = torch.tensor(limit + 1.0, device="cpu")
    grid = torch.logspace(0, torch.log10(largest).item(), bins + 1, device="cpu").round()
    for n in range(1, len(grid)):
        grid[n] = torch.maximum(grid[n], grid[n - 1] + 1)
    return torch.cat([grid[grid < limit + 1], largest[None]])


def log_likelihood(
    logits: torch.Tensor, grid: torch.Tensor, remaining: torch.Tensor, censored: torch.Tensor
) -> torch.Tensor:
    """Return the log likelihood of each pair, up to a constant.

    Parameters
    ----------
    logits
        [pairs, bins] of the hazards.
    grid
        [bins + 1] edges.
    remaining
        [pairs] tokens that were generated; where `censored`, more would have been.
    """
    # A censored pair is longer than `remaining`: it ends at remaining + 1 or later.
    at = remaining.float() + censored.float()
    index = (torch.searchsorted(grid, at, right=True) - 1).clamp(0, logits.shape[1] - 1)
    survived = torch.cumsum(-softplus(logits), 1)
    before = torch.where(index > 0, survived.gather(1, (index - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    own = logits.gather(1, index[:, None])[:, 0]
    start, width = grid[index], grid[index + 1] - grid[index]
    # The part of its bin that a censored pair exceeds.
    part = ((at - start) / width).clamp(0, 1)
    exceeded = torch.log1p(-part * torch.sigmoid(own) * (1 - 1e-6))
    return before + torch.where(censored, exceeded, logsigmoid(own))


def cumulative(logits: torch.Tensor) -> torch.Tensor:
    """Return [pairs, bins + 1]: the chance to have ended before each edge."""
    survived = torch.exp(torch.cumsum(-softplus(logits), 1))
    return torch.cat([torch.zeros_like(survived[:, :1]), 1 - survived], 1)


def quantiles(ended: torch.Tensor, grid: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return [pairs, levels]: remaining tokens at each level of probability.

    Parameters
    ----------
    ended
        [pairs, bins + 1] as `cumulative` gives it.
    """
    wanted = levels.expand(len(ended), -1).contiguous()
    index = (torch.searchsorted(ended.contiguous(), wanted, right=True) - 1).clamp(0, len(grid) - 2)
    low, high = ended.gather(1, index), ended.gather(1, index + 1)
    part = ((wanted - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    # The length is a whole number, drawn with equal chances from [edge, next edge): its quantile lies 0.5 below.
    inside = grid[index] + part * (grid[index + 1] - grid[index]) - 0.5
    rate = torch.log((1 - ended[:, -2:-1]).clamp(min=1e-9) / (1 - ended[:, -1:]).clamp(min=1e-9))
    rate = torch.maximum(rate / (grid[-1] - grid[-2]), 0.25 / grid[-1])
    after = grid[-1] + torch.log((1 - ended[:, -1:]).clamp(min=1e-9) / (1 - wanted)).clamp(min=0) / rate
    return torch.where(wanted < ended[:, -1:], inside, after).clamp(min=0.5)
