"""Suspension: a long request gives its room to one that would miss its first token, and resumes in time.

A request that decodes faster than its TPOT objective saves time: at 21 ms a token against 30 ms, a request of 30,000
tokens may stand still for four minutes and still meet it. That is room for the requests that have just come. To suspend
is to cut a request and let its KV go; to resume is to prefill its tokens again, on a prefill instance, and to hand it
over like a new one.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SuspendSettings:
    """When a running request gives way to a waiting one.

    Attributes
    ----------
    ttft_s, tpot_s
        The objectives that requests are to meet.
    after_s
        How long a request waits before another is suspended for it.
    least_slack_s
        Seconds that a request must have to spare to be suspended.
    least_gap_s
        Shortest objective for the longest gap that a pause can keep: a cut, a wait, a prefill and a transfer take time,
        whatever the other objectives are. None below `least_slack_s` is kept, either.
    urgent_s
        A suspended request with less to spare resumes before all others.
    urgent_steps
        Steps ahead for which there must be room for it then.
    longest_s
        A suspended request resumes before all others after this time, whatever its objective: the bound on starvation.
    longest_missed_s
        The same for one whose gap has an objective, and has missed it.
    ratio
        Memory-time of the suspended over that of the one it makes room for, at least.
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
        """Return the same for other objectives: its times were tuned at this first token, and scale with it."""
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
    """Return the seconds that a request may stand still and still meet its TPOT objective at its end.

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
