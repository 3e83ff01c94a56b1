"""vLLM's own scheduler with speculative decoding and our connector: a test says which drafts its model accepts."""

import json
from collections import deque
from pathlib import Path
from typing import Any

from ares.engine import identity
from ares.protocol import messages
from tests.engine.control_channel import Gateway, free_address, until

DRAFTS = 3
LIMIT = 1000


def configuration(folder: Path, block: int, *, method: str = "draft_model", asynchronous: bool = False) -> Any:
    """Return vLLM's configuration of a model of two layers, of which there is only the description."""
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        KVTransferConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        SpeculativeConfig,
        VllmConfig,
    )

    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(shape))
    # vLLM imports the connector while it makes the configuration, and the connector reads these.
    identity.export(identity.InstanceSettings("decode-0", "decode", "boot", free_address()))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, max_model_len=4096, dtype="float32")
    parallel = ParallelConfig()
    drafting = {"model": str(folder)} if method == "draft_model" else {"prompt_lookup_max": 3}
    config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=block, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_model_len=4096, is_encoder_decoder=False, max_num_batched_tokens=2048, max_num_seqs=8
        ),
        parallel_config=parallel,
        device_config=DeviceConfig("cpu"),
        speculative_config=SpeculativeConfig(
            method=method,
            num_speculative_tokens=DRAFTS,
            target_model_config=model,
            target_parallel_config=parallel,
            **drafting,
        ),
        kv_transfer_config=KVTransferConfig(
            kv_connector="NixlConnector", kv_connector_module_path="ares.engine.connector.connector", kv_role="kv_both"
        ),
    )
    config.cache_config.num_gpu_blocks = 2000
    config.scheduler_config.async_scheduling = asynchronous  # which the CPU platform takes back
    return config


class Engine:
    """A decode instance without a model.

    Attributes
    ----------
    tokens
        Tokens that each step gives a request: the accepted drafts and one more.
    """

    def __init__(self, config: Any, window: int | None = None) -> None:
        import torch
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            KVCacheTensor,
            SlidingWindowSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        address = identity.current().control_address
        self.block = config.cache_config.block_size
        blocks = config.cache_config.num_gpu_blocks
        shape = {"block_size": self.block, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
        groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
        if window is not None:
            groups.append(KVCacheGroupSpec(["window"], SlidingWindowSpec(**shape, sliding_window=window)))
        page = groups[0].kv_cache_spec.page_size_bytes
        tensors = [KVCacheTensor(page * blocks, [group.layer_names[0]], page * blocks, page) for group in groups]
        cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=groups)
        self._asynchronous = config.scheduler_config.async_scheduling
        kind = AsyncScheduler if self._asynchronous else Scheduler
        self.scheduler = kind(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=self.block,
        )
        self.side = self.scheduler.connector.connector_scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.tokens = 1
        self._begun: deque[Any] = deque()
        self._next = 0
        self._sent: set[str] = set()
        self._transfers: dict[str, dict[str, Any]] = {}
        self._gateway = Gateway(address)
        self._gateway.send(messages.Subscribe(0.01, "gateway"))
        self._gateway.receive_a(messages.Hello)

    def close(self) -> None:
        self._gateway.close()
        self.scheduler.connector.shutdown()

    def add(self, length: int, **params: Any) -> Any:
        """Add a request with so many tokens of prompt that no other request has."""
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        from ares.engine.vllm_api import Request, SamplingParams

        hashing = get_hash_fn_by_name("sha256")
        init_none_hash(hashing)
        self._next += 1
        key = f"gateway/{self._next}"
        limit = 1 if params.get("do_remote_decode") else LIMIT
        sampling = SamplingParams(max_tokens=limit, extra_args={"kv_transfer_params": {"ares_key": key, **params}})
        prompt = [3 + (self._next * 7919 + n) % 900 for n in range(length)]
        request = Request(key, prompt, sampling, None, block_hasher=get_request_block_hasher(self.block, hashing))
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> None:
        """Begin a step."""
        self._begun.append(self.scheduler.schedule())

    def process(self) -> None:
        """End the oldest step that has begun."""
        from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput

        step = self._begun.popleft()
        ids = list(step.num_scheduled_tokens)
        given = []
        for request_id in ids:
            drafts = len(step.scheduled_spec_decode_tokens.get(request_id, ()))
            given.append([9] * min(self.tokens, drafts + 1))
        output = ModelRunnerOutput(ids, {request_id: n for n, request_id in enumerate(ids)}, given)
        output.kv_connector_output, self._sent = KVConnectorOutput(finished_sending=self._sent), set()
        for outputs in self.scheduler.update_from_output(step, output).values():
            self._transfers.update((end.request_id, end.kv_transfer_params) for end in outputs.outputs if end.finished)
        if not self._asynchronous:
            self.scheduler.update_draft_token_ids(DraftTokenIds(ids, [[9] * DRAFTS] * len(ids)))

    def run_until(self, request: Any, length: int) -> None:
        """Run until a request has at least so many tokens, or has ended, with the next step begun."""
        while request.num_tokens < length and not request.is_finished():
            self.schedule()
            if not self._asynchronous or len(self._begun) > 1:
                self.process()

    def transfer_of(self, request: Any) -> dict[str, Any]:
        """Return how the KV of a request that has ended is pulled."""
        return self._transfers[request.request_id]

    def copy(self, request: Any) -> messages.CopyResult:
        """Pin the full blocks of a running request, and let them be pulled."""
        self._gateway.send(messages.Copy(self._next, request.request_id, f"pin-{self._next}", LIMIT))
        until(self.side.has_pending_push_work)
        self.schedule()
        for _ in range(2 if self._asynchronous else 0):  # until the workers know of it
            self.process()
            self.schedule()
        answer = self._gateway.receive_a(messages.CopyResult)
        self._sent = {answer.kv_transfer_params["remote_request_id"]}
        self.process()
        return answer

    def cut(self, request: Any) -> messages.CutResult:
        """Cut a request; return the answer after the step that ended it and the steps begun by then."""
        self._gateway.send(messages.Cut(self._next, request.request_id))
        until(self.side.has_pending_push_work)
        self.run_until(request, LIMIT)
        while self._begun:
            self.process()
        return self._gateway.receive_a(messages.CutResult)
