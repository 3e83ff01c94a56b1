"""`paper`: the rescheduler of the ARES paper (arXiv 2510.13668), as a special case of the rule in ares.py.

Point predictions, tokens as load, and no view of memory but the target's limit.
"""

from dataclasses import asdict, dataclass, replace

from ares.policy.cluster import Cluster
from ares.policy.rebalance import ares
from ares.policy.rebalance.base import MigrationDecision, Rebalance, register


@dataclass(frozen=True, slots=True)
class PaperSettings:
    """Settings of `paper`: those of `ares` (`AresSettings`) but for `deviations` and `memory_weight`."""

    theta: float = 0.1
    minimum_gain: float = 0.01
    reserve: float = 0.1
    moves_per_round: int = 2
    cooldown_s: float = 10.0
    horizon: int = 4000
    points: int = 64
    decay: float = 1000.0
    amortise: float = 4.0
    sources: int = 4
    targets: int = 8

    def __post_init__(self) -> None:
        ares.check(self)


@register("paper")
class Paper(Rebalance):
    """Evens out predicted tokens."""

    Settings = PaperSettings
    predicts = True
    settings: PaperSettings

    @classmethod
    def prepare(cls) -> None:
        """Compile the inner loops."""
        ares.prepare()

    def decide(self, cluster: Cluster) -> list[MigrationDecision]:
        """Return the moves of one period."""
        middle = len(cluster.levels) // 2
        remaining = cluster.remaining_tokens
        plain = replace(
            cluster,
            step_base_s=None,
            step_request_s=None,
            step_token_s=None,
            remaining_tokens=None if remaining is None else remaining[:, middle : middle + 1],
            levels=(0.5,),
        )
        return ares.decide(plain, ares.AresSettings(**asdict(self.settings), deviations=0.0, memory_weight=0.0))
