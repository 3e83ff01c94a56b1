"""vLLM's own chat route over given tokens: its request, its renderer's adjustments, its detokenizer, its generators."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine.detokenizer import IncrementalDetokenizer


class Reference:
    """A server of vLLM without an engine."""

    def __init__(self, folder: Path, **flags: Any) -> None:
        self.tokenizer = get_tokenizer(str(folder), tokenizer_mode="hf")
        read = json.loads((folder / "config.json").read_text())
        kind = SimpleNamespace(model_type=read["model_type"])
        self.model_config: Any = SimpleNamespace(
            model="some/model",
            hf_config=kind,
            hf_text_config=kind,
            hf_overrides={},
            architecture=read["architectures"][0],
            generation_config="auto",
            override_generation_config={},
            max_model_len=1 << 20,
            multimodal_config=None,
            enable_prompt_embeds=False,
            get_diff_sampling_param=dict,
        )
        self._prompt: list[int] = []
        renderer: Any = SimpleNamespace(
            tokenizer=self.tokenizer, get_tokenizer=lambda: self.tokenizer, render_chat_async=self._rendered
        )
        shared: Any = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": "auto",
            "enable_auto_tools": flags.get("enable_auto_tool_choice", False),
            "tool_parser": flags.get("tool_call_parser"),
            "reasoning_parser": flags.get("reasoning_parser"),
        }
        self.renderer = OnlineRenderer(self.model_config, renderer, **shared)
        client: Any = SimpleNamespace(
            model_config=self.model_config, renderer=renderer, input_processor=None, vllm_config=None
        )
        models: Any = SimpleNamespace()
        self.serving = OpenAIServingChat(client, models, "assistant", online_renderer=self.renderer, **shared)

    async def _rendered(self, messages: list[Any], *_: Any, **__: Any) -> Any:
        return [[]], [{"type": "token", "prompt_token_ids": self._prompt}]

    async def request(self, chat: dict[str, Any], prompt: list[int]) -> ChatCompletionRequest:
        """Return the request as its parser has adjusted it."""
        self._prompt = prompt
        request = ChatCompletionRequest.model_validate(json.loads(json.dumps(chat)))
        rendered = await self.renderer.render_chat(request)
        assert isinstance(rendered, tuple), rendered
        return request

    def variables(self, request: ChatCompletionRequest) -> dict[str, Any]:
        return request.build_chat_params(None, "auto").chat_template_kwargs

    async def stream(
        self, chat: dict[str, Any], prompt: list[int], chunks: list[list[int]], reason: str
    ) -> list[dict[str, Any]]:
        """Return the chunks that vLLM streams."""
        request = await self.request({**chat, "stream": True}, prompt)
        found = self.serving.chat_completion_stream_generator(
            request,
            self._outputs(request, prompt, chunks, reason, delta=True),
            "id",
            "model",
            [],
            self.tokenizer,
            RequestResponseMetadata(request_id="id"),
            chat_template_kwargs=self.variables(request),
        )
        lines = [line.removeprefix("data: ").strip() async for line in found]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    async def whole(
        self, chat: dict[str, Any], prompt: list[int], chunks: list[list[int]], reason: str
    ) -> dict[str, Any]:
        """Return the reply that vLLM sends as a whole."""
        request = await self.request(chat, prompt)
        assert self.serving.parser_cls is not None
        parser = self.serving.parser_cls(
            self.tokenizer,
            request.tools,
            chat_template_kwargs=self.variables(request),
            model_config=self.model_config,
        )
        reply = await self.serving.chat_completion_full_generator(
            request,
            self._outputs(request, prompt, chunks, reason, delta=False),
            "id",
            "model",
            [],
            self.tokenizer,
            RequestResponseMetadata(request_id="id"),
            parser=parser,
        )
        return json.loads(reply.model_dump_json())

    async def _outputs(
        self, request: ChatCompletionRequest, prompt: list[int], chunks: list[list[int]], reason: str, *, delta: bool
    ) -> AsyncIterator[RequestOutput]:
        params = request.to_sampling_params(1 << 16, {})
        asked: Any = SimpleNamespace(
            sampling_params=params, prompt_token_ids=prompt, prompt_embeds=None, request_id="id"
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self.tokenizer, asked)
        every: list[int] = []
        for number, chunk in enumerate(chunks):
            every += chunk
            last = number == len(chunks) - 1
            matched = detokenizer.update(list(chunk), last and reason == "stop")
            finish = "stop" if matched is not None else reason if last else None
            text = detokenizer.get_next_output_text(finish is not None, delta)
            shown = chunk if delta else detokenizer.output_token_ids
            output = CompletionOutput(0, text, list(shown), None, None, finish_reason=finish, stop_reason=matched)
            yield RequestOutput("id", None, prompt, None, [output], finish is not None)
            if finish is not None:
                return
