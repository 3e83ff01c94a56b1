"""Instances of an application of Ray Serve; with Ray itself: tests/ray."""

import asyncio
import contextlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ares.gateway.discovery.ray import RaySource
from ares.gateway.tuning import Tuning
from tests.gateway.discovery.following import Following

QUICK = Tuning(ray_period_s=0.01, ray_answer_s=0.5)
A, B = "http://a:1", "http://b:1"


class Serve:
    """What the source uses of Serve, with a directory that answers what a test says."""

    def __init__(self) -> None:
        self.answer: Any = ([A], True)
        self.urls = SimpleNamespace(remote=self._urls)

    def get_deployment_handle(self, name: str, application: str) -> "Serve":
        assert (name, application) == ("Directory", "chat")
        return self

    async def _urls(self) -> Any:
        if self.answer is None:
            await asyncio.sleep(600)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Serve:
    ray, made = ModuleType("ray"), Serve()
    ray.serve, ray.is_initialized = made, lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    return made


async def test_what_a_new_directory_does_not_know_yet_stays(directory: Serve) -> None:
    following = Following()
    task = asyncio.create_task(following.run(RaySource("ray:chat", "chat", QUICK)))
    try:
        assert await following.next() == [A]
        directory.answer = ([], False)
        await asyncio.sleep(0.1)
        directory.answer = ([B], False)
        assert await following.next() == [A, B]
        directory.answer = ([B], True)
        assert await following.next() == [B]
        directory.answer = ([], True)
        assert await following.next() == []
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_directory_that_cannot_be_asked_is_an_error_and_the_next_answer_counts(directory: Serve) -> None:
    following = Following()
    directory.answer = RuntimeError("no cluster")
    task = asyncio.create_task(following.run(RaySource("ray:chat", "chat", QUICK)))
    try:
        assert await following.next() == "its directory cannot be asked (RuntimeError: no cluster)"
        directory.answer = None
        await following.until("its directory has not answered for 0.5 s")
        directory.answer = ([A], True)
        await following.until([A])
        directory.answer = (["nonsense"], True)
        await following.until("'nonsense' is not the URL of an instance, such as http://127.0.0.1:8100")
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
