"""Workloads: recorded traces in the field's formats, and synthetic ones."""

from ares.traces.readers import FORMATS, TIME_UNITS, guess_format, rate_warning, read_trace
from ares.traces.records import TraceError
from ares.traces.synthetic import WORKLOADS, synthetic
from ares.traces.workload import Workload

__all__ = [
    "FORMATS",
    "TIME_UNITS",
    "WORKLOADS",
    "TraceError",
    "Workload",
    "guess_format",
    "rate_warning",
    "read_trace",
    "synthetic",
]
