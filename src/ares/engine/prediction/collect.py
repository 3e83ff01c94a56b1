"""Generation with vLLM, in batches and in this process, with the hidden states of every k-th token.

Used by `ares predictor collect` (whole outputs) and `ares predictor noise-floor` (continuations of prefixes).
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ares.engine.defaults import is_cpu_build
from ares.predictor.errors import PredictorError
from ares.predictor.shards import Outcome, Output, sampling

# KV of a CPU build; on a GPU vLLM takes what is free.
_CPU_KV_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to generate.

    Attributes
    ----------
    every
        Tokens between two states that are kept; 0 keeps none.
    limit
        Most tokens of one output; an output that reaches it without a stop token is censored.
    """

    model: str
    folder: Path
    temperature: float
    top_p: float
    limit: int
    batch: int
    every: int
    seed: int

    @property
    def sampling(self) -> str:
        """The sampling as data folders name it."""
        return sampling(self.temperature, self.top_p)


class Generator:
    """One vLLM engine that generates outputs for token ids."""

    def __init__(self, settings: GenerationSettings) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_PLUGINS", "")
        if is_cpu_build():
            os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        # Only now: vLLM reads the environment while it is imported.
        from ares.engine.vllm_api import LLM

        options: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_KV_BYTES}
        llm = LLM(
            model=str(settings.folder),
            worker_cls="ares.engine.prediction.hidden_state_worker.CollectingWorker",
            max_num_seqs=settings.batch,
            seed=settings.seed,
            disable_log_stats=True,
            async_scheduling=False,
            **(options if is_cpu_build() else {}),
        )
        self.tokenizer = llm.get_tokenizer()
        config = llm.model_config
        self.hidden_size = int(config.get_hidden_size())
        self._room = int(config.max_model_len)
        self._engine = llm.llm_engine
        self._settings = settings
        self._rpc = llm.collective_rpc
        self._rpc("ares_collect_every", args=(settings.every,))

    def chat(self, text: str, system: str | None = None) -> list[int]:
        """Return the token ids of a user's message, behind a system prompt, as the model's chat template has them.

        Raises
        ------
        PredictorError
            There is a system prompt, and the model has no chat template.
        """
        if self.tokenizer.chat_template is None:
            if system is not None:
                raise PredictorError(f"{self._settings.model} has no chat template: --system-prompt has no place in it")
            return list(self.tokenizer.encode(text))
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": text})
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return [int(t) for t in ids]

    def has_room(self, output: Output) -> bool:
        """Whether a prompt leaves room for a token in the model's context; `run` skips one that does not."""
        return len(output.prompt_tokens) < self._room

    def run(
        self, outputs: Sequence[Output], limits: Sequence[int] | None = None, until: float = math.inf
    ) -> Iterator[tuple[Output, int]]:
        """Generate every output from its prompt; yield each, complete, as it ends, with the tokens made so far.

        Parameters
        ----------
        limits
            Most tokens of each output, where they differ.
        until
            When (`time.monotonic`) to stop beginning outputs. Those that run then are completed: dropping them would
            leave out the long ones.
        """
        from ares.engine.vllm_api import SamplingParams

        settings = self._settings
        waiting = list(zip(outputs, limits or [settings.limit] * len(outputs), strict=True))[::-1]
        running: dict[str, Output] = {}
        made = 0
        while waiting or running:
            if time.monotonic() > until:
                waiting = []
            while waiting and len(running) < settings.batch:
                output, limit = waiting.pop()
                if not self.has_room(output):
                    continue
                limit = output.limit = min(limit, self._room - len(output.prompt_tokens))
                params = SamplingParams(
                    temperature=settings.temperature, top_p=settings.top_p, max_tokens=limit, detokenize=False
                )
                self._engine.add_request(output.request, {"prompt_token_ids": list(output.prompt_tokens)}, params)
                running[output.request] = output
            finished = self._engine.step()
            if settings.every:
                for request_id, position, state in self._rpc("ares_take")[0]:
                    # vLLM appends a suffix to the id it was given.
                    owner = running.get(request_id) or running[request_id.rsplit("-", 1)[0]]
                    owner.positions.append(position)
                    owner.states.append(state)
            made += len(finished)
            for reply in finished:
                if reply.finished:
                    output = running.pop(reply.request_id)
                    output.output_tokens = list(reply.outputs[0].token_ids)
                    output.censored = reply.outputs[0].finish_reason != "stop"
                    output.outcome = Outcome.LIMIT if output.censored else Outcome.STOP
                    yield output, made
