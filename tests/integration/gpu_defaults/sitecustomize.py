"""Runs vLLM's CPU build as vLLM runs on a GPU by default: with the V2 model runner and asynchronous scheduling.

Python imports this module by its name when the folder is on PYTHONPATH, in every process of an instance. It replaces
four things of vLLM 0.32.0 and one of Triton, each right after the module that holds it is imported:

- `triton.backends` gets a backend called "cpu" that stands for Triton's own interpreter. Without one,
  vllm/triton_utils/importing.py switches Triton off, and without Triton vllm/config/vllm.py (`use_v2_model_runner`)
  chooses the V1 runner.
- `CpuPlatform.check_and_update_config` (vllm/platforms/cpu.py) leaves asynchronous scheduling as
  vllm/config/vllm.py has chosen it: on, unless `--no-async-scheduling` is given. The stock method switches it off.
- `apply_top_k_top_p` (vllm/v1/sample/ops/topk_topp_sampler.py) is its PyTorch version, which CPUs use anyway where
  there is no Triton: the Triton kernel does not run in the interpreter.
- `create_masked_store` of the interpreter (triton/runtime/interpreter.py, 3.9.0) takes a mask of integers, which the
  kernel that applies a grammar has (vllm/v1/worker/gpu/structured_outputs.py). The stock method raises an error, which
  ends the engine; compiled kernels know no such difference.
- `UniProcExecutor.collective_rpc` (vllm/v1/executor/uniproc_executor.py) runs the worker in a thread of its own. On a
  GPU a step is queued, and the scheduler goes on meanwhile; on a CPU the stock method returns when the step is
  computed, so that the tokens of each step would wait for the next one.

Everything else is vLLM's own code: its scheduler, its V2 runner (vllm/v1/worker/cpu/model_runner.py is a subclass of
the GPU's) and its sampling kernels, interpreted. `VLLM_USE_V2_MODEL_RUNNER=0` takes the V1 runner back.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any


def _add_cpu_backend(module: ModuleType) -> None:
    from triton.backends.driver import DriverBase

    class InterpreterDriver(DriverBase):  # type: ignore[misc]
        """Only looked up and asked whether it is active: the interpreter never compiles or launches through it."""

        def __init__(self) -> None: ...

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            from triton.backends.compiler import GPUTarget

            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is measured in the interpreter")

    InterpreterDriver.__abstractmethods__ = frozenset()
    module.backends["cpu"] = module.Backend(None, InterpreterDriver)  # type: ignore[attr-defined]


def _keep_async_scheduling(module: ModuleType) -> None:
    platform = module.CpuPlatform  # type: ignore[attr-defined]
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    platform.check_and_update_config = classmethod(check_and_update_config)


def _without_top_k_top_p_kernel(module: ModuleType) -> None:
    module.apply_top_k_top_p = module.apply_top_k_top_p_pytorch  # type: ignore[attr-defined]


def _take_integer_masks(module: ModuleType) -> None:
    builder = module.InterpreterBuilder  # type: ignore[attr-defined]
    stock = builder.create_masked_store

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return stock(self, ptrs, value, mask, *rest)

    builder.create_masked_store = create_masked_store


def _run_worker_in_thread(module: ModuleType) -> None:
    executor = module.UniProcExecutor  # type: ignore[attr-defined]
    stock = executor.collective_rpc

    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        if non_block:
            # A copy, as the processes of other executors get it: the scheduler goes on to change what it has given.
            args = pickle.loads(pickle.dumps(args))  # noqa: S301 - our own
        device = vars(self).setdefault("_device", ThreadPoolExecutor(1, "device"))
        result = device.submit(stock, self, method, timeout, args, kwargs, single_value=single_value)
        return result if non_block else result.result()

    executor.collective_rpc = collective_rpc
    # The scheduler's thread does not wait for as long as by default while the other one computes.
    sys.setswitchinterval(0.0005)


class ReplacingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of `replacements` as Python would, and calls the replacement once the module has run."""

    def __init__(self, replacements: dict[str, Callable[[ModuleType], None]]) -> None:
        self._replacements = replacements

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        replace = self._replacements.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if replace is not None else None
        if replace is None or spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_replace(module: ModuleType) -> None:
            run(module)
            replace(module)

        spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec


# Read when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
sys.meta_path.insert(
    0,
    ReplacingFinder(
        {
            "triton.backends": _add_cpu_backend,
            "triton.runtime.interpreter": _take_integer_masks,
            "vllm.platforms.cpu": _keep_async_scheduling,
            "vllm.v1.executor.uniproc_executor": _run_worker_in_thread,
            "vllm.v1.sample.ops.topk_topp_sampler": _without_top_k_top_p_kernel,
        }
    ),
)
