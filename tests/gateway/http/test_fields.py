"""Every field of a request has an effect on the engine's request or on the reply, or is refused by name."""

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ares.gateway.openai import unsupported
from ares.gateway.openai.requests import ChatRequest, CompletionRequest
from ares.gateway.session.objectives import Objective
from tests.gateway.fakes import instances
from tests.gateway.http.fields import CHAT, COMPLETION, Case
from tests.gateway.http.service import Service, failure, serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    "{{ documents }}{{ enable_thinking }}{{ reasoning_effort }}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer begins prompts with a special token, and whose template has all variables."""
    made = Path(shutil.copytree(model_folder, tmp_path_factory.mktemp("fields") / "model"))
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([*"QRSTUVWXYZ"])  # an output has some of them
    tokenizer.save(str(made / "tokenizer.json"))
    settings = json.loads((made / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
async def service(folder: Path) -> AsyncIterator[Service]:
    async with (
        instances("prefill", "decode", vocabulary=VOCABULARY) as fakes,
        serving(fakes, folder) as made,
    ):
        await eventually(lambda: all(i.health.healthy and i.state.hello for i in made.gateway.pool.instances), 15)
        yield made


async def observed(service: Service, body: dict[str, Any], *, chat: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    """All that can be seen of a request: what engines are asked for, in which order it comes, and its reply."""
    objectives: list[Objective] = []
    generate = service.gateway.generate

    async def noted(name: str, prompt: list[int], sampling: Any, emit: Any, objective: Objective, *others: Any) -> None:
        objectives.append(objective)
        await generate(name, prompt, sampling, emit, objective, *others)

    before = [len(fake.asked) for fake in service.fakes]
    with monkeypatch.context() as patch:
        patch.setattr(service.gateway, "generate", noted)
        reply = await service.client.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    asked = [
        {name: value for name, value in one.items() if name not in ("request_id", "kv_transfer_params")}
        for fake, count in zip(service.fakes, before, strict=True)
        for one in fake.asked[count:]
    ]
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n")] if body.get("stream") else [reply.text]
    parts = [json.loads(line) if line.startswith("{") else line for line in lines]
    for part in parts:
        if isinstance(part, dict):
            part.pop("id", None)
            part.pop("created", None)
    named = reply.headers.get("x-request-id") == body.get("request_id")
    return reply.status_code, asked, [objective.rank for objective in objectives], named, parts


@pytest.mark.parametrize(
    ("case", "chat"),
    [
        *(pytest.param(case, True, id=f"chat-{case.field}") for case in CHAT),
        *(pytest.param(case, False, id=f"completion-{case.field}") for case in COMPLETION),
    ],
)
async def test_a_field_has_an_effect(service: Service, monkeypatch: pytest.MonkeyPatch, case: Case, chat: bool) -> None:
    base: dict[str, Any] = {"max_tokens": 8}
    base |= {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi"}
    base |= case.rest
    if chat and base.get("logprobs"):
        base["logprobs"] = True
    if case.field == "max_completion_tokens":
        base[case.field] = base.pop("max_tokens")
    without = await observed(service, base, chat=chat, monkeypatch=monkeypatch)
    assert without == await observed(service, base, chat=chat, monkeypatch=monkeypatch)  # else nothing is shown
    assert without[0] == 200, without
    assert without != await observed(service, base | {case.field: case.value}, chat=chat, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("field", "chat"),
    [
        (field, chat)
        for chat, request in ((True, ChatRequest), (False, CompletionRequest))
        for field in unsupported.refused()
        if field not in request.model_fields
    ],
)
async def test_a_field_that_is_not_offered_is_refused(service: Service, field: str, chat: bool) -> None:
    error = failure(await (service.chat if chat else service.complete)(**{field: {"x": "y"}}), 400)
    assert error["param"] == field
    assert error["message"].startswith(f"{field} is not offered here")
    neutral = await (service.chat if chat else service.complete)(**{field: None}, max_tokens=1)
    assert neutral.status_code == 200


@pytest.mark.parametrize("field", unsupported.WITHOUT_EFFECT)
async def test_a_field_without_effect_in_vllm(service: Service, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    body = {"prompt": "Hi", "max_tokens": 3}
    value = 2.0 if field == "length_penalty" else "x"
    without = await observed(service, body, chat=False, monkeypatch=monkeypatch)
    assert without == await observed(service, body | {field: value}, chat=False, monkeypatch=monkeypatch)
