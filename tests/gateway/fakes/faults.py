"""What goes wrong at a fake, beyond the faults of the mock engine."""

from dataclasses import dataclass


@dataclass(slots=True)
class Faults:
    """What goes wrong; changed at any time."""

    refuse: int | None = None
    """Answer generations with this HTTP status."""
    hang: bool = False
    """Accept the connection and never answer."""
    silent_stream: bool = False
    """Answer, and never send a token."""
    mute_after: int | None = None
    """Lose what a stream sends after so many tokens, also its end."""
    answer_after_s: float = 0.0
    """Answer a generation this late."""
    break_after: int | None = None
    """Reset the connection of a generation after so many of its tokens."""
    break_at_cut: bool = False
    """Reset the connection of a cut request instead of sending what its stream has not sent yet."""
    tail_after_s: float = 0.0
    """Deliver the end of a cut request's stream this late (then break it, if that is asked too)."""
    handover_after_s: float = 0.0
    """Answer a `Cut` or a `Copy` this late."""
    lose_tokens: int = 0
    """Lose each so many-th message with the tokens of a step; 1: all."""
    wrong_tokens: bool = False
    """Send other tokens after a step than in the reply."""
    lose_handover: bool = False
    """Never answer a `Cut` or a `Copy`."""
    not_running: bool = False
    """Answer every `Cut` with `not_running`."""
    deaf: bool = False
    """Leave every command unread."""
    fail_pull: bool = False
    """Recompute instead of pulling."""
    error_in_stream: int | None = None
    """End a stream with this error after its first token."""
    shortens_prompts: bool = False
    """Leave the end of each prompt to the decode instance, so that what a prefill samples is no token of the output."""
    abort: bool = False
    """End every running request as aborted, at its next step."""
    repeats: bool = False
    """Find that the output repeats itself, where a request is cut or prefilled."""
