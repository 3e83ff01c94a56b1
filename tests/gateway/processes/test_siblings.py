"""Where processes ask each other."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from starlette.requests import Request
from starlette.types import Message

from ares.addresses import AddressError
from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.processes.siblings import STATUS_ROUTE, SiblingRefusedError, Siblings


def test_a_temporary_directory_that_is_too_deep(tmp_path: Path) -> None:
    Siblings(Path("/tmp"), SharedCounts(2)).check()  # noqa: S108 - nothing is written there
    with pytest.raises(AddressError, match="set TMPDIR to a shorter one"):
        Siblings(tmp_path / ("x" * 100), SharedCounts(2)).check()


async def test_a_process_that_is_not_there_gives_no_answer(tmp_path: Path) -> None:
    counts = SharedCounts(3)
    siblings = Siblings(tmp_path, counts)
    for counts.process in (1, 2, 0):
        counts.beat()
    assert await siblings.ask(1, STATUS_ROUTE) is None
    assert await siblings.ask_all(lambda process: f"{STATUS_ROUTE}?{process}") == {}
    with pytest.raises(SiblingRefusedError, match="does not answer; try again"):
        raise siblings.unavailable(1)
    await siblings.close()


def test_the_folder_is_made_again_but_none_that_others_can_open_is_used(tmp_path: Path) -> None:
    siblings = Siblings(tmp_path / "sockets", SharedCounts(2))
    for _ in range(2):
        siblings.make_folder()
        assert siblings.folder.stat().st_mode & 0o777 == 0o700
    siblings.folder.chmod(0o777)
    with pytest.raises(PermissionError, match="not a folder of this user alone"):
        siblings.make_folder()
    siblings.folder.rmdir()
    siblings.folder.symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        siblings.make_folder()


def command(path: str = "/admin/v1/preset") -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {
        "type": "http",
        "method": "PUT",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
    }
    return Request(scope, receive)


@contextlib.asynccontextmanager
async def sibling(folder: Path, status: int, text: str) -> AsyncIterator[Siblings]:
    """Let process 1 answer every command so."""

    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    counts = SharedCounts(2)
    counts.process = 1
    counts.beat()
    counts.process = 0
    siblings = Siblings(folder, counts)
    await web.UnixSite(runner, str(siblings.socket(1))).start()
    yield siblings
    await siblings.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (500, "Internal Server Error", "failed: status 500"),
        (500, "{}", "failed: status 500"),
        (200, "no JSON", "failed: status 200"),
        (409, '{"error": {"message": "the last one", "code": "last_instance"}}', "the last one"),
    ],
)
async def test_a_command_that_another_process_does_not_take_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, text: str, message: str
) -> None:
    async with sibling(tmp_path, status, text) as siblings:
        await siblings.tell_others(command())
        assert message in caplog.text
        with pytest.raises(SiblingRefusedError, match=message):
            await siblings.forward(1, command())
