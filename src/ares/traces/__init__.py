"""Workloads: recorded traces in the field's formats, and synthetic ones."""

from ares.traces.readers import FORMATS, TraceError, guess_format, read_trace
from ares.traces.synthetic import WORKLOADS, synthetic
from ares.traces.workload import Workload

__all__ = ["FORMATS", "WORKLOADS", "TraceError", "Workload", "guess_format", "read_trace", "synthetic"]
