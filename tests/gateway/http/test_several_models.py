"""Several models behind one gateway: each has instances, rendering and requests of its own."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.fakes import FakeInstance, instances
from tests.gateway.http.service import Service, failure, serving
from tests.gateway.running import VOCABULARY
from tests.waiting import eventually, eventually_found

MODELS: list[dict[str, Any]] = [
    {"model": "org/one", "served_model_name": ["one", "uno"]},
    {"model": "org/two", "maximum_prompt_tokens": 60},
]
ROLES = ("prefill", "decode", "decode")


@pytest.fixture(scope="module")
def second_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the same tokenizer and another chat template."""
    folder = tmp_path_factory.mktemp("second") / "model"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "TWO:{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
async def ones() -> AsyncIterator[list[FakeInstance]]:
    async with instances(*ROLES, vocabulary=VOCABULARY) as fakes:
        serve_model(fakes, "one")
        yield fakes


@pytest.fixture
async def twos() -> AsyncIterator[list[FakeInstance]]:
    async with instances(*ROLES, vocabulary=VOCABULARY) as fakes:
        serve_model(fakes, "org/two", "mine")
        yield fakes


@pytest.fixture
async def service(
    ones: list[FakeInstance], twos: list[FakeInstance], model_folder: Path, second_folder: Path
) -> AsyncIterator[Service]:
    settings: dict[str, Any] = {"models": MODELS, "handover_timeout_s": 5.0, "preset": "ares"}
    async with serving([*twos, *ones], model_folder, further=[second_folder], **settings) as made:
        await eventually(lambda: [len(each) for each in urls(made)] == [3, 3], 60)
        await eventually(lambda: all(i.open and i.state.hello for i in made.models.instances), 60)
        yield made


def serve_model(fakes: list[FakeInstance], name: str, *adapters: str) -> None:
    for fake in fakes:
        fake.models, fake.adapters = [name], list(adapters)


def urls(service: Service) -> list[list[str]]:
    """The instances of each model that stay."""
    return [sorted(i.url for i in gateway.pool.instances if not i.leaving) for gateway in service.models]


def of(fakes: list[FakeInstance]) -> list[str]:
    return sorted(fake.url for fake in fakes)


def asked(fakes: list[FakeInstance]) -> int:
    return sum(len(fake.asked) for fake in fakes)


async def status(service: Service) -> dict[str, Any]:
    return dict((await service.client.get("/admin/v1/status")).json())


async def begin(
    service: Service, fakes: list[FakeInstance], name: str, model: str, tokens: int = 40
) -> "asyncio.Task[Any]":
    """Start a request that stays where it is until `hold_at` is taken back."""
    for fake in fakes[1:]:
        fake.hold_at = 25
    body = {"model": model, "prompt": [10, 20, 30], "max_tokens": tokens, "return_token_ids": True}
    work = service.client.post("/v1/completions", json=body, headers={"X-Request-Id": name})
    task = asyncio.create_task(work)
    await eventually(lambda: any(r.output for fake in fakes[1:] for r in fake.running.values()), 30)
    return task


async def test_requests_and_instances_go_by_their_model(
    service: Service, ones: list[FakeInstance], twos: list[FakeInstance]
) -> None:
    assert urls(service) == [of(ones), of(twos)]
    listed = (await service.client.get("/v1/models")).json()["data"]
    assert [(one["id"], one.get("parent"), one["max_model_len"]) for one in listed] == [
        ("one", None, 4096),
        ("uno", None, 4096),
        ("org/two", None, 4096),
        ("mine", "org/two", 4096),
    ]
    assert (await service.client.get("/v1/models/mine")).json()["parent"] == "org/two"

    # Each by its own template, on its own instances, under its own limits.
    for model, fakes, others in (("uno", ones, twos), ("org/two", twos, ones), ("mine", twos, ones)):
        before = asked(fakes), asked(others)
        reply = await service.chat(model=model, return_prompt_text=True)
        assert reply.status_code == 200, reply.text
        assert reply.json()["model"] == ("one" if model == "uno" else model)
        assert asked(fakes) > before[0]
        assert asked(others) == before[1]
        tokens = await service.client.post(
            "/tokenize", json={"model": model, "messages": [{"role": "user", "content": "Hi"}]}
        )
        text = await service.client.post("/detokenize", json={"model": model, "tokens": tokens.json()["tokens"]})
        assert ("TWO" in text.json()["prompt"]) == (fakes is twos)
        counted = await service.client.post(
            "/v1/messages/count_tokens",
            json={"model": model, "messages": [{"role": "user", "content": "Hi"}]},
        )
        assert counted.json()["input_tokens"] == tokens.json()["count"]
    long = {"prompt": [10] * 70}
    assert (await service.complete(model="one", **long)).status_code == 200
    assert failure(await service.complete(model="org/two", **long), 400)["code"] == "context_length_exceeded"

    # As vLLM says it, and a name is needed.
    for route, body in (
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        error = failure(await service.client.post(route, json=body | {"model": "three"}), 404)
        assert error == {
            "message": "The model `three` does not exist.",
            "type": "not_found_error",
            "param": "model",
            "code": "model_not_found",
        }
        assert failure(await service.client.post(route, json=body), 400)["message"] == (
            "model: say which one; served are one, org/two"
        )
    assert failure(await service.client.get("/v1/models/three"), 404)["code"] == "model_not_found"


async def test_operators_see_all_models_and_move_within_one(
    service: Service, ones: list[FakeInstance], twos: list[FakeInstance]
) -> None:
    tasks = [await begin(service, ones, "same", "one"), await begin(service, twos, "same", "mine")]
    shown = await status(service)
    assert [(row["name"], row["names"], row["adapters"], row["why"]) for row in shown["models"]] == [
        ("one", ["one", "uno"], [], None),
        ("org/two", ["org/two"], ["mine"], None),
    ]
    # Instances of two models may call themselves the same; ids of requests are told apart, too.
    names = {row["url"]: row["name"] for row in shown["instances"]}
    assert len({*names.values()}) == 6
    assert {row["url"]: row["model"] for row in shown["instances"]} == {
        **{fake.url: "one" for fake in ones},
        **{fake.url: "org/two" for fake in twos},
    }
    running = {row["id"]: row for row in shown["requests"]}
    assert {name: row["model"] for name, row in running.items()} == {"same": "one", "same#2": "org/two"}
    free = {
        row["id"]: next(
            names[fake.url]
            for fake in (ones if row["model"] == "one" else twos)[1:]
            if names[fake.url] != row["instance"]
        )
        for row in running.values()
    }

    async def migrate(name: str, target: str) -> tuple[int, dict[str, Any]]:
        body = {"request_id": name, "target": target}
        reply = await service.client.post("/admin/v1/migrations", json=body, timeout=30)
        return reply.status_code, reply.json()

    refused, why = await migrate("same", free["same#2"])
    assert (refused, why["error"]["code"]) == (409, "target_unavailable")
    assert why["error"]["message"] == f"{free['same#2']} does not serve one: requests do not move between models"
    moves = [asyncio.create_task(migrate(name, target)) for name, target in free.items()]
    await eventually(lambda: sum(len(fake.cuts) for fake in (*ones, *twos)) == 2, 30)
    for fake in (*ones, *twos):
        fake.hold_at = None
    assert [(code, move["outcome"]) for code, move in await asyncio.gather(*moves)] == [(200, "moved")] * 2
    outputs = [(await task).json() for task in tasks]
    assert [output["usage"]["completion_tokens"] for output in outputs] == [40, 40]
    assert len((await status(service))["migrations"]) == 2

    # An instance is drained where it is; the last one of its model is not, whatever the other model has.
    async def drain(fake: FakeInstance) -> Any:
        return await service.client.post(f"/admin/v1/instances/{names[fake.url]}/drain", json={})

    assert (await drain(twos[1])).status_code == 200
    await eventually(lambda: not next(i for i in service.models.instances if i.url == twos[1].url).open, 30)
    assert failure(await drain(twos[2]), 409)["code"] == "last_instance"
    assert (await drain(ones[1])).status_code == 200
    switched = await service.client.put("/admin/v1/preset", json={"preset": "off"})
    assert switched.json() == {"preset": "off"}
    assert [gateway.controller.preset for gateway in service.models] == ["off", "off"]


async def test_metrics_name_the_model(service: Service) -> None:
    await service.complete(model="one")
    await service.complete(model="org/two", max_tokens=7)
    await service.complete(model="three")
    text = (await service.client.get("/metrics")).text
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        known = found.setdefault(sample.name, {})
        model = sample.labels.get("model_name", "")
        known[model] = known.get(model, 0.0) + sample.value
    assert found["ares_output_tokens_total"] == {"one": 20, "org/two": 7}
    assert found["ares_instance_up"] == {"one": 3, "org/two": 3}
    assert found["vllm:num_requests_running"].keys() == {"one", "org/two"}
    assert found["ares_http_refused_total"] == {"": 1}
    assert text.count("# TYPE ares_output_tokens_total") == 1


async def test_a_model_without_instances_leaves_the_others_alone(
    service: Service, ones: list[FakeInstance], twos: list[FakeInstance]
) -> None:
    ready = await service.client.get("/ready")
    assert ready.json() == {"status": "ready", "models": {"one": "ready", "org/two": "ready"}}
    for fake in twos[1:]:
        await fake.die()

    async def lost() -> bool:
        shown = (await service.client.get("/ready")).json()["models"]["org/two"]
        return "decode-0" in shown and "decode-1" in shown

    await eventually_found(lost, 60)
    assert (await service.complete(model="one")).status_code == 200
    for fake in ones[1:]:
        await fake.die()

    async def none_ready() -> str:
        reply = await service.client.get("/ready")
        return "" if reply.status_code == 200 else failure(reply, 503)["message"]

    message = await eventually_found(none_ready, 60)
    assert "one: " in message
    assert "; org/two: " in message


async def test_an_instance_belongs_to_the_model_that_it_says(
    service: Service, ones: list[FakeInstance], twos: list[FakeInstance]
) -> None:
    # It starts again with another model: of this gateway, and then of none.
    moved = twos[2]
    await moved.die()
    moved.models, moved.adapters = ["ONE"], []
    await moved.start()
    await eventually(lambda: urls(service) == [of([*ones, moved]), of(twos[:2])], 60)
    await eventually(lambda: all(i.open for i in service.models.instances if i.url == moved.url), 60)
    await eventually(lambda: len(service.models.instances) == 6, 60)  # the other pool has forgotten it
    await moved.die()
    moved.models = ["org/three"]
    await moved.start()

    async def why() -> str:
        rows = {row["url"]: row for row in (await status(service))["instances"]}
        text = str(rows[moved.url]["why"])
        return text if "org/three" in text else ""

    assert (await eventually_found(why, 60)).endswith("org/three instead of one of one, org/two")
    # By hand it goes from wherever it is, and comes back to where it belongs.
    removed = await service.client.delete(f"/workers/{moved.url}?force=true")
    assert removed.status_code == 200, removed.text
    await eventually(lambda: service.models.at(moved.url) is None, 60)
    await moved.die()
    moved.models = ["org/two"]
    await moved.start()
    assert (await service.client.post("/workers", json={"url": moved.url})).status_code == 200
    await eventually(lambda: urls(service) == [of(ones), of(twos)], 60)
    changes = (await service.client.get("/admin/v1/instances")).json()["changes"]
    assert ("joined", "it serves org/two") in [(change["state"], change["why"]) for change in changes]
