"""Shapes of chaos runs: many mock engines, and few real ones."""

import msgspec

from ares_dev.chaos.plan import Shape

MOCK = Shape(
    prefill=4,
    decode=20,
    per_process=4,
    streams=40,
    seconds=120.0,
    simulated=True,
    longest_prompt=500,
    longest_output=400,
    events_per_s=1.0,
    moves_per_s=4.0,
)
REAL = msgspec.structs.replace(
    MOCK, prefill=1, decode=2, streams=4, simulated=False, events_per_s=0.1, moves_per_s=1.0, prompts=8
)
