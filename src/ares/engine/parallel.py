"""Which of vLLM's ways to spread one engine over processes and hosts an instance can use."""

from typing import Any


def unsupported(settings: Any) -> str | None:
    """Say what is not supported and what to do instead; None where everything is.

    Parameters
    ----------
    settings
        vLLM's parsed arguments of `vllm serve`, or its ParallelConfig (config/parallel.py, 0.32): the names that both
        have are the same.
    """
    stages, ranks = settings.pipeline_parallel_size, settings.data_parallel_size
    if getattr(settings, "headless", False):
        return (
            "--headless: an instance runs on one host, and its own HTTP server is how gateways find it; leave it out, "
            "and start one `ares worker` on each host"
        )
    if settings.nnodes > 1:
        return (
            f"--nnodes {settings.nnodes}: an instance runs on one host; use --tensor-parallel-size up to its number of "
            "GPUs, and start one `ares worker` on each host"
        )
    if stages > 1:
        return (
            f"--pipeline-parallel-size {stages}: the KV of a request would be freed when the first stage has been "
            f"pulled; use --tensor-parallel-size {stages * settings.tensor_parallel_size} instead"
        )
    if ranks > 1:
        return (
            f"--data-parallel-size {ranks}: gateways place and move requests between instances, not between ranks in "
            "one; start one `ares worker` for each rank, with GPUs (CUDA_VISIBLE_DEVICES), --port and --name of its own"
        )
    if (getattr(settings, "api_server_count", None) or 1) > 1:
        return f"--api-server-count {settings.api_server_count}: an instance has one HTTP server; leave it out"
    if getattr(settings, "grpc", False):
        return "--grpc: gateways speak HTTP with an instance; leave it out"
    return None
