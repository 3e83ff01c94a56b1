"""Commands to an instance over its control channel, and the answers that belong to them."""

import asyncio
import itertools
from typing import Any

from ares.gateway.pool.channel import ControlSocket
from ares.gateway.tuning import DEFAULT
from ares.protocol import messages, rpc
from ares.protocol.fields import CutOutcome


class ControlClient:
    """Sends commands to one instance; without a connection they are dropped, and calls time out.

    Parameters
    ----------
    kept_reports
        How many reports of a kind are kept until they are asked for.
    """

    def __init__(self, kept_reports: int = DEFAULT.kept_reports) -> None:
        self._kept_reports = kept_reports
        self._socket: ControlSocket | None = None
        self._call_numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._awaited_pulls: dict[str, asyncio.Future[messages.KvReceived]] = {}
        self._finished_pulls: dict[str, messages.KvReceived] = {}
        self._predictions: dict[str, messages.Predicted] = {}

    def attach(self, socket: ControlSocket) -> None:
        """Send over this connection from now on."""
        self._socket = socket

    def detach(self) -> None:
        """Send nothing any more."""
        self._socket = None

    @property
    def waiting_for(self) -> int:
        """How many answers and finished pulls are waited for."""
        return len(self._calls) + len(self._awaited_pulls)

    # --- commands ---

    async def cut(self, key: str, timeout_s: float) -> messages.CutResult:
        """Ask the instance to end request `key` and keep its KV.

        Raises
        ------
        TimeoutError
            No answer in time; whether the request was cut is then unknown.
        """
        call = next(self._call_numbers)
        answer: messages.CutResult = await self._call(call, messages.Cut(call, key), timeout_s)
        return answer

    async def copy(self, key: str, pin: str, most: int, timeout_s: float) -> messages.CopyResult:
        """Ask the instance to pin the full KV blocks of running request `key`, at most `most` tokens, under `pin`.

        Raises
        ------
        TimeoutError
            No answer in time; blocks that are pinned nevertheless are released when the answer comes.
        """
        call = next(self._call_numbers)
        answer: messages.CopyResult = await self._call(call, messages.Copy(call, key, pin, most), timeout_s)
        return answer

    async def change_role(self, role: messages.Role, deadline_s: float, timeout_s: float) -> messages.RoleResult:
        """Order a change of role, or end one with the role that the instance has.

        Raises
        ------
        TimeoutError
            No answer in time; if it changes nevertheless, its telemetry says so.
        """
        call = next(self._call_numbers)
        answer: messages.RoleResult = await self._call(call, messages.ChangeRole(call, role, deadline_s), timeout_s)
        return answer

    async def lease(self, holder: str, ttl_s: float, timeout_s: float) -> messages.LeaseResult | None:
        """Ask for the instance's part of the controller's lease, for `ttl_s`; None without an answer in time."""
        call = next(self._call_numbers)
        try:
            answer: messages.LeaseResult = await self._call(call, messages.Lease(call, holder, ttl_s), timeout_s)
        except TimeoutError:
            return None
        return answer

    async def end_lease(self, holder: str) -> None:
        """Give the instance's part of the lease back, without waiting for its answer."""
        await self._send(messages.Lease(next(self._call_numbers), holder, 0.0))

    async def release(self, key: str) -> None:
        """Let the instance free the KV of request `key`: it will not be pulled."""
        await self._send(messages.Release(key))

    async def expect(self, key: str, within_s: float) -> None:
        """Tell the instance that request `key` is about to come."""
        await self._send(messages.Expect(key, within_s))

    async def drain(self, deadline_s: float) -> None:
        """Tell the instance to drain; requests that still run after `deadline_s` leave it."""
        await self._send(messages.Drain(True, deadline_s))

    async def undrain(self) -> None:
        """Tell the instance to take new requests again."""
        await self._send(messages.Drain(False))

    async def connect_peers(self, peers: list[messages.Peer]) -> None:
        """Let the instance do the NIXL handshake with peers before a request needs it."""
        await self._send(messages.Connect(peers))

    async def send(self, body: bytes) -> None:
        """Send an encoded command, if there is a connection."""
        if self._socket is not None:
            self._socket.send(body)

    # --- answers ---

    async def until_kv_received(self, key: str, timeout_s: float) -> messages.KvReceived | None:
        """Wait until the instance reports that the KV of request `key` has arrived; None where it does not in time."""
        if (known := self._finished_pulls.pop(key, None)) is not None:
            return known
        future: asyncio.Future[messages.KvReceived] = asyncio.get_running_loop().create_future()
        self._awaited_pulls[key] = future
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return None
        finally:
            del self._awaited_pulls[key]

    def prediction(self, key: str) -> messages.Predicted | None:
        """Return what this instance predicted of request `key`, which it prefilled.

        It comes before the prefill's reply; None where the instance does not predict. The request's own limit is not
        applied yet.
        """
        return self._predictions.get(key)

    async def on_result(
        self, result: messages.CutResult | messages.CopyResult | messages.LeaseResult | messages.RoleResult
    ) -> None:
        """Take the answer to a call; KV pinned for a call that has timed out is released, not kept until its lease."""
        waiting = self._calls.get(result.call)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)
        elif isinstance(result, messages.CutResult) and result.outcome == CutOutcome.PINNED:
            await self.release(result.key)
        elif isinstance(result, messages.CopyResult) and result.tokens:
            await self.release(result.pin)

    async def on_kv_received(self, event: messages.KvReceived) -> None:
        """Take the report that KV has arrived."""
        waiting = self._awaited_pulls.get(event.key)
        if waiting is None:
            # It may come before `kv_received` is called; for most requests it never is.
            self._keep(self._finished_pulls, event.key, event)
        elif not waiting.done():
            waiting.set_result(event)

    async def on_predicted(self, event: messages.Predicted) -> None:
        """Take the prediction of a request that the instance prefills."""
        self._keep(self._predictions, event.key, event)

    async def _call(self, call: int, command: messages.Command, timeout_s: float) -> Any:
        future = self._calls[call] = asyncio.get_running_loop().create_future()
        try:
            await self._send(command)
            async with asyncio.timeout(timeout_s):
                return await future
        finally:
            del self._calls[call]

    async def _send(self, command: messages.Command) -> None:
        await self.send(rpc.encode(command))

    def _keep(self, reports: dict[str, Any], key: str, report: Any) -> None:
        """Keep a report, and drop the oldest where there are too many."""
        reports[key] = report
        if len(reports) > self._kept_reports:
            del reports[next(iter(reports))]
