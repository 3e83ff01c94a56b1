"""Two processes behind one address: each answers for both, and each lives for itself."""

import asyncio
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from ares.cli.main import app
from ares.gateway import serving
from ares.gateway.openai import tokenizer
from ares.gateway.processes import child
from tests.certificates import self_signed
from tests.gateway.fakes import FakeInstance, free_port
from tests.gateway.gateways import configuration, hold, stop_holding
from tests.gateway.learner_reports import event, report
from tests.gateway.processes.service import Processes, prompt, serving_in_processes
from tests.waiting import eventually, eventually_found

TOKENS = 40


async def both_say(gateway: Processes, draining: bool) -> bool:
    return [(await gateway.status())["instances"][1]["draining"] for _ in range(2)] == [draining] * 2


async def test_whichever_is_asked_answers_for_both(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving_in_processes(fakes, model_folder, handover_timeout_s=5.0) as gateway:
        hold(fakes, 20)
        streams = [gateway.stream(f"r{n}", prompt(n), TOKENS) for n in range(6)]
        await asyncio.gather(*(output.reach(10) for output, _ in streams))
        for status in (await gateway.status(), await gateway.status()):
            assert sorted(row["id"] for row in status["requests"]) == [f"r{n}" for n in range(6)]
            assert [one["requests"] for one in status["processes"]] == [3, 3]
            assert [(row["name"], row["healthy"]) for row in status["instances"]] == [
                ("prefill-0", True),
                ("decode-0", True),
                ("decode-1", True),
            ]
            assert sum(row["sessions"] for row in status["instances"]) == 6
            # Each knows what the other has placed.
            assert {row["instance"] for row in status["requests"]} == {"decode-0", "decode-1"}
        # Half of them are at the other process than the one that gets the command.
        where = {row["id"]: row["instance"] for row in (await gateway.status())["requests"]}
        others = {"decode-0": "decode-1", "decode-1": "decode-0"}
        moves = [asyncio.create_task(gateway.migrate(name, others[where[name]])) for name in where]
        await eventually(lambda: len(fakes[1].cuts) + len(fakes[2].cuts) == 6)
        hold(fakes, 30)
        assert [(code, move["outcome"]) for code, move in await asyncio.gather(*moves)] == [(200, "moved")] * 6
        assert (await gateway.migrate("r", "decode-0"))[0] == 404
        stop_holding(fakes)
        for number, (_, task) in enumerate(streams):
            await gateway.check(number, task, TOKENS)
        shown = [await gateway.metrics() for _ in range(2)]
        for metrics in shown:
            assert sum(value for name, value in metrics.items() if name.startswith("ares_requests_total{")) == 6
            assert [metrics[f'ares_gateway_process_active_requests{{process="{n}"}}'] for n in (0, 1)] == [0, 0]
            assert metrics["ares_output_tokens_total"] == 6 * TOKENS
            assert metrics['ares_migrations_total{outcome="moved",trigger="commanded"}'] == 6
            assert metrics['ares_instance_up{instance="decode-0",role="decode"}'] == 1
        shown_moves = (await gateway.status())["migrations"]
        assert sorted(move["request_id"] for move in shown_moves) == [f"r{n}" for n in range(6)]
        events = await gateway.events()
        assert [move["request_id"] for move in events["moves"]] == [move["request_id"] for move in shown_moves]
        assert (events["snapshot"]["gateway"], events["snapshot"]["requests_total"]) == (status["gateway"], 0)

        # Commands for instances and of presets reach both.
        assert await gateway.command("PUT", "preset", preset="static-rr") == 200
        assert await gateway.command("PUT", "preset", preset="unheard-of") == 400
        assert [(await gateway.status())["preset"] for _ in range(2)] == ["static-rr"] * 2
        for order, draining in (("drain", True), ("undrain", False)):
            assert await gateway.command("POST", f"instances/decode-0/{order}") == 200
            # A report that the instance sent before it knew may come after the command.
            await eventually_found(functools.partial(both_say, gateway, draining))
        assert await gateway.command("DELETE", "instances/decode-1?deadline_s=5") == 200

        async def forgotten() -> bool:
            statuses = [await gateway.status() for _ in range(2)]
            return all("decode-1" not in [row["name"] for row in status["instances"]] for status in statuses)

        await eventually_found(forgotten, 20)
        assert await gateway.command("POST", "instances", url=fakes[2].url) == 200
        # A learner's reports are at one of them, whichever gets them, and its events are counted once.
        for _ in range(2):
            await gateway.command("PUT", "predictor", **report(events=[event(10)]))
        assert [[*(await gateway.status())["learner_ages_s"]] for _ in range(2)] == [["host-1"]] * 2
        assert (await gateway.metrics())['ares_predictor_events_total{event="promoted"}'] == 1


async def test_streams_are_at_both_whatever_ends_between_them(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving_in_processes(fakes, model_folder) as gateway:
        hold(fakes, 20)
        streams = []
        for number in range(6):
            output, task = gateway.stream(f"r{number}", prompt(number), TOKENS)
            streams.append(task)
            await output.reach(10)
            async with gateway.http.get(f"{gateway.url}/health") as reply:
                assert reply.status == 200
            await asyncio.sleep(0.05)  # for its end to be noticed
        assert [one["requests"] for one in (await gateway.status())["processes"]] == [3, 3]
        stop_holding(fakes)
        for number, task in enumerate(streams):
            await gateway.check(number, task, TOKENS)


async def test_a_change_of_role_is_waited_for_whichever_answers(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving_in_processes(fakes, model_folder, handover_timeout_s=5.0) as gateway:
        hold(fakes, 20)
        streams = [gateway.stream(f"r{n}", prompt(n), TOKENS) for n in range(4)]
        await asyncio.gather(*(output.reach(10) for output, _ in streams))
        stop_holding(fakes)
        for role in ("prefill", "decode"):
            order = ["role", "decode-0", role, "--wait", "--url", gateway.url]
            done = await asyncio.to_thread(CliRunner().invoke, app, order)
            assert (done.exit_code, done.stdout.strip()) == (0, f"decode-0 has the role {role}"), done.output
        for number, (_, task) in enumerate(streams):
            await gateway.check(number, task, TOKENS)


async def test_a_process_that_is_stopped_delays_no_command_and_gets_it_when_it_runs_again(
    fakes: list[FakeInstance], model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving_in_processes(fakes, model_folder) as gateway:
        # The reports of learners are for this one.
        stopped = psutil.Process((await gateway.processes())[0]["pid"])
        stopped.suspend()
        try:
            await asyncio.sleep(2.5)  # until then it gets connections
            loop = asyncio.get_running_loop()
            began = loop.time()
            assert await gateway.command("PUT", "preset", preset="static-rr") == 200
            for order in ("drain", "undrain", "drain"):
                assert await gateway.command("POST", f"instances/decode-0/{order}") == 200
            assert await gateway.command("PUT", "predictor", **report(events=[])) == 503
            assert (await gateway.status())["preset"] == "static-rr"
            assert loop.time() - began < 15
            assert "does not run now; it gets the command when it does" in capfd.readouterr().err
        finally:
            stopped.resume()

        async def all_know() -> bool:
            found = []
            for _ in range(2):
                status = await gateway.status()
                found.append((len(status["processes"]), status["preset"], status["instances"][1]["draining"]))
            return found == [(2, "static-rr", True)] * 2

        await eventually_found(all_know, 30)
        assert await gateway.command("POST", "instances/decode-0/undrain") == 200
        await eventually_found(functools.partial(both_say, gateway, False))


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary directory of this test; pytest's own is too long for the path of a socket."""
    with tempfile.TemporaryDirectory() as made:
        monkeypatch.setattr(tempfile, "tempdir", made)
        yield Path(made)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


async def test_sockets_that_are_removed_are_there_again(
    fakes: list[FakeInstance], model_folder: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "SOCKET_CHECK_S", 0.2)
    async with serving_in_processes(fakes, model_folder) as gateway:
        (folder,) = names_in(temporary)
        shutil.rmtree(temporary / folder)
        await eventually(lambda: {"0.sock", "1.sock"} <= names_in(temporary / folder), 30)
        for _ in range(2):
            assert len((await gateway.status())["processes"]) == 2
        assert await gateway.command("PUT", "preset", preset="static-rr") == 200
        assert [(await gateway.status())["preset"] for _ in range(2)] == ["static-rr"] * 2
    assert not names_in(temporary)


async def test_limits_count_for_the_address(
    fakes: list[FakeInstance], model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"api_keys": ["one", "two"], "maximum_streams_per_key": 3, "maximum_waiting": 4}
    async with serving_in_processes(fakes, model_folder, **settings) as gateway:
        url, body = f"{gateway.url}/v1/completions", gateway.body(prompt(0), 30, stream=True)

        async def ask(key: str) -> tuple[int, str]:
            async with gateway.http.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as reply:
                return reply.status, await reply.text()

        fakes[0].faults.hang = True
        waiting = [asyncio.create_task(ask(key)) for key in ("one", "one", "one", "two")]

        async def all_wait() -> bool:
            return bool((await gateway.status())["backlog"] == 4)

        await eventually_found(all_wait, 20)
        for _ in range(2):
            code, text = await ask("one")
            assert code == 429
            assert "3 sequences of this key run already" in text
            code, text = await ask("two")
            assert code == 503
            assert "4 requests wait already" in text
        fakes[0].faults.hang = False
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

        # Without room for a file a process loses a connection, says so, and goes on.
        process = psutil.Process((await gateway.processes())[0]["pid"])
        limits = process.rlimit(psutil.RLIMIT_NOFILE)
        process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), limits[1]))
        said = ""
        with contextlib.ExitStack() as connections:

            async def lost() -> bool:
                nonlocal said
                address = "127.0.0.1", int(gateway.url.rpartition(":")[2])
                connections.enter_context(socket.create_connection(address, 10))
                said += capfd.readouterr().err
                return "a connection is lost: this process has too many files open" in said

            await eventually_found(lost, 20)
        process.rlimit(psutil.RLIMIT_NOFILE, limits)
        assert "Traceback" not in said


async def test_one_is_killed_and_both_are_told_to_end(fakes: list[FakeInstance], model_folder: Path) -> None:
    async with serving_in_processes(fakes, model_folder) as gateway:
        assert await gateway.command("PUT", "preset", preset="static-rr") == 200
        _, first = gateway.stream("first", prompt(9), TOKENS)
        await gateway.check(9, first, TOKENS)
        before = await gateway.metrics()
        hold(fakes, 20)
        streams = [gateway.stream(f"r{n}", prompt(n), TOKENS) for n in range(4)]
        await asyncio.gather(*(output.reach(10) for output, _ in streams))
        victim, survivor = await gateway.processes()
        os.kill(victim["pid"], signal.SIGKILL)
        await asyncio.wait([task for _, task in streams], return_when=asyncio.FIRST_COMPLETED)
        stop_holding(fakes)
        outcomes = await asyncio.gather(*(task for _, task in streams), return_exceptions=True)
        lost = [
            n for n, one in enumerate(outcomes) if isinstance(one, BaseException) or one.error or not one.finish_reason
        ]
        assert len(lost) == 2
        for number in {*range(4)} - {*lost}:
            await gateway.check(number, streams[number][1], TOKENS)

        # Another one in its place, with another name; what the first had counted is not forgotten.
        again, same = await gateway.processes()
        assert same["gateway"] == survivor["gateway"]
        assert again["gateway"] not in (victim["gateway"], survivor["gateway"])
        assert [(await gateway.status())["preset"] for _ in range(2)] == ["static-rr"] * 2
        after = await gateway.metrics()
        assert after['ares_gateway_process_restarts_total{process="0"}'] == 1
        assert after["ares_prompt_tokens_total"] >= before["ares_prompt_tokens_total"] + 2 * 3
        await asyncio.gather(*(gateway.check(n, gateway.stream(f"s{n}", prompt(n), 20)[1], 20) for n in range(4)))

        # SIGTERM: what runs may finish, and then both end.
        hold(fakes, 20)
        streams = [gateway.stream(f"t{n}", prompt(n), TOKENS) for n in range(2)]
        await asyncio.gather(*(output.reach(10) for output, _ in streams))
        children = psutil.Process(gateway.parent.pid).children()
        gateway.parent.terminate()

        async def refuses() -> bool:
            async with gateway.http.get(f"{gateway.url}/ready") as reply:
                return reply.status == 503

        await eventually_found(refuses)
        stop_holding(fakes)
        for number, (_, task) in enumerate(streams):
            await gateway.check(number, task, TOKENS)
        await asyncio.to_thread(gateway.parent.join, 20)
        assert gateway.parent.exitcode == -signal.SIGTERM
        assert not any(child.is_running() for child in children)


async def test_processes_that_run_again_only_after_the_end_was_ordered_finish_their_streams(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    async with serving_in_processes(fakes, model_folder) as gateway:
        found = await gateway.processes()
        hold(fakes, 20)
        streams = [gateway.stream(f"r{n}", prompt(n), TOKENS) for n in range(2)]
        await asyncio.gather(*(output.reach(10) for output, _ in streams))
        for process in found:
            os.kill(process["pid"], signal.SIGSTOP)
        await asyncio.sleep(2.5)  # now they count as hanging
        gateway.parent.terminate()
        await asyncio.sleep(0.7)  # and the address is closed
        for process in found:
            os.kill(process["pid"], signal.SIGCONT)
        await asyncio.sleep(1.0)
        stop_holding(fakes)
        for number, (_, task) in enumerate(streams):
            await gateway.check(number, task, TOKENS)
        await asyncio.to_thread(gateway.parent.join, 20)
        assert gateway.parent.exitcode == -signal.SIGTERM


async def test_a_process_that_starts_again_knows_which_instances_were_added_and_removed(
    fakes: list[FakeInstance], model_folder: Path
) -> None:
    given, added = fakes[:2], fakes[2]
    async with serving_in_processes(given, model_folder) as gateway:
        assert await gateway.command("POST", "instances", url=added.url) == 200
        assert await gateway.command("DELETE", "instances/decode-0?deadline_s=0&force=true") == 200

        async def known() -> bool:
            names = [[row["name"] for row in (await gateway.status())["instances"]] for _ in range(4)]
            return all(sorted(one) == ["decode-1", "prefill-0"] for one in names)

        await eventually_found(known, 20)
        victim, _ = await gateway.processes()
        os.kill(victim["pid"], signal.SIGKILL)

        async def again() -> bool:
            return (await gateway.processes())[0]["pid"] != victim["pid"]

        await eventually_found(again, 30)
        await eventually_found(known, 20)


async def test_a_start_that_is_ended_leaves_no_folder(
    fakes: list[FakeInstance], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(serving, "prepare", lambda _: time.sleep(30))
    config = configuration(fakes, processes=2, port=free_port()).model_copy(update={"model": str(model_folder)})
    tokenizer.load(model_folder)

    def start() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        serving.serve(config, lambda *_: None)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    await eventually(lambda: any(tmp_path.glob("ares-gateway-*")))
    process.terminate()
    await asyncio.to_thread(process.join, 20)
    assert process.exitcode == 128 + signal.SIGTERM
    await eventually(lambda: not any(tmp_path.iterdir()))


async def test_processes_speak_tls_and_end_with_their_parent(
    fakes: list[FakeInstance], model_folder: Path, tmp_path: Path
) -> None:
    certificate, key = self_signed(tmp_path)
    tls: dict[str, Any] = {"tls_certificate": certificate, "tls_key": key}
    async with serving_in_processes(fakes, model_folder, "https", **tls) as gateway:
        with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert plain.recv(1) == b""
        await asyncio.gather(*(gateway.check(n, gateway.stream(f"s{n}", prompt(n), 20)[1], 20) for n in range(4)))
        children = psutil.Process(gateway.parent.pid).children()
        assert len(children) == 2
        gateway.parent.kill()
        await eventually(lambda: not any(child.is_running() for child in children), 20)
