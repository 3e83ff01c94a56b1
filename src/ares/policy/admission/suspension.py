"""Suspension: a long request makes room for one that would miss its TTFT, and resumes in time.

A request that decodes faster than its TPOT objective gains slack: at 21 ms a token against 30 ms, a request of 30,000
tokens may be suspended for four minutes and still meet it. That is room for new requests. To suspend is to stop a
request and free its KV; to resume is to prefill its tokens again, on a prefill instance, and to hand it over like a new
one.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SuspendSettings:
    """When a running request is suspended for a waiting one.

    Attributes
    ----------
    ttft_s, tpot_s
        The objectives that requests are to meet.
    after_s
        How long a request waits before another is suspended for it.
    least_slack_s
        Slack in seconds that a request needs to be suspended.
    least_gap_s
        Shortest gap objective that a suspension can meet: stopping, waiting, prefill and transfer take time. Objectives
        below `least_slack_s` are not met either.
    urgent_s
        A suspended request with less slack resumes before all others.
    urgent_steps
        Steps ahead for which there must be room for it then.
    longest_s
        A suspended request resumes before all others after this time, whatever its objective: the bound on starvation.
    longest_missed_s
        The same for one that has missed its gap objective.
    ratio
        Least ratio of the memory-time of the suspended request to that of the one it makes room for.
    """

    ttft_s: float = 20.0
    tpot_s: float = 0.03
    after_s: float = 1.0
    least_slack_s: float = 60.0
    least_gap_s: float = 10.0
    urgent_s: float = 20.0
    urgent_steps: float = 125.0
    longest_s: float = 900.0
    longest_missed_s: float = 300.0
    ratio: float = 1.3

    def for_objectives(self, ttft_s: float, tpot_s: float | None = None) -> "SuspendSettings":
        """Return the settings for other objectives: the times were tuned for `ttft_s`, and scale with it."""
        scale = ttft_s / self.ttft_s
        return replace(
            self,
            ttft_s=ttft_s,
            tpot_s=self.tpot_s if tpot_s is None else tpot_s,
            after_s=self.after_s * scale,
            least_slack_s=self.least_slack_s * scale,
            urgent_s=self.urgent_s * scale,
        )


def final_slack_s(tpot_s: float, generated: float, elapsed_s: float, remaining: float, step_s: float) -> float:
    """Return for how many seconds a request may be suspended and still meet its TPOT objective at its end.

    Parameters
    ----------
    tpot_s
        Objective, seconds per token.
    generated, remaining
        Output tokens so far, and predicted to come.
    elapsed_s
        Seconds since its first token.
    step_s
        Seconds a token takes while it runs.
    """
    return tpot_s * generated - elapsed_s + remaining * (tpot_s - step_s)
