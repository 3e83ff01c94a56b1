"""ARES: live rebalancing of running requests for prefill-decode disaggregated serving on stock vLLM."""

__version__ = "0.1.0"
