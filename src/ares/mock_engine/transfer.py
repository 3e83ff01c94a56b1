"""KV between two mock instances: one HTTP request in place of a NIXL read.

`POST /simulate/pull` to the source names a pin. The source answers when the bytes would have arrived, frees the pin,
and sends the model's state after the pinned tokens. The target generates from that state: KV of other tokens than its
own makes it write other tokens than it should, as on a real engine. A lease that has ended, or an instance that has
restarted since, is an error here, where a real engine may read blocks that belong to another request by now.
"""

from typing import Any

import aiohttp
import msgspec

from ares import addresses
from ares.mock_engine.pins import Pin
from ares.mock_engine.settings import EngineSettings, Identity
from ares.protocol import fields

PULL_ROUTE = "/simulate/pull"
EXTEND_ROUTE = "/simulate/extend"
# Without the transfer itself: a source that sends nothing for so long is considered dead.
_TIMEOUT_S = 10.0


class Pull(msgspec.Struct):
    """Asks for the KV of a pinned request, without the first `cached` tokens; `discard`: only free it."""

    engine_id: str
    request_id: str
    discard: bool = False
    cached: int = 0


class Pulled(msgspec.Struct):
    """The KV that was transferred: `tokens`, and the model's state after them."""

    tokens: int
    hash: int


class Extend(msgspec.Struct):
    """Renews the leases of pins."""

    engine_id: str
    request_ids: list[str]


def kv_transfer_params(source: Identity, engine_id: str, pin: Pin) -> dict[str, Any]:
    """Return vLLM's kv_transfer_params for the instance that will pull."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        fields.REMOTE_BLOCK_IDS: [list(range(pin.blocks))],
        "remote_engine_id": engine_id,
        "remote_request_id": pin.id,
        "remote_host": source.published_host,
        "remote_port": source.port,
        "tp_size": 1,
        "remote_num_tokens": pin.tokens,
    }


class PullError(Exception):
    """The KV could not be pulled."""


def transfer_s(settings: EngineSettings, tokens: int) -> float:
    """Return the seconds that a transfer of the KV of this many tokens takes."""
    profile = settings.profile
    real_s = profile.latency_s + tokens * profile.kv_bytes_per_token / profile.bandwidth_bytes_s
    return real_s / settings.speed


class Puller:
    """Pulls KV from other instances."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def pull(
        self, source: dict[str, Any], expected_s: float, *, discard: bool = False, cached: int = 0
    ) -> Pulled:
        """Pull the KV that vLLM's kv_transfer_params name, which should take `expected_s`; `cached` tokens are here.

        Raises
        ------
        PullError
            The source is gone or silent, or no longer has it.
        """
        body = Pull(source[fields.REMOTE_ENGINE_ID], source[fields.REMOTE_REQUEST_ID], discard, cached)
        return await self._post(source, PULL_ROUTE, body, expected_s)

    async def extend(self, source: dict[str, Any], request_ids: list[str]) -> None:
        """Renew the leases of pins at their source; PullError as in `pull`."""
        await self._post(source, EXTEND_ROUTE, Extend(source[fields.REMOTE_ENGINE_ID], request_ids))

    async def _post(self, source: dict[str, Any], route: str, body: msgspec.Struct, expected_s: float = 0.0) -> Pulled:
        host, port = source[fields.REMOTE_HOST], source[fields.REMOTE_PORT]
        url = f"http://{addresses.with_port(host, port)}{route}"
        limit = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S / 2, sock_read=_TIMEOUT_S + expected_s)
        try:
            async with self._http.post(url, data=msgspec.json.encode(body), timeout=limit) as reply:
                data = await reply.read()
                if reply.status != 200:
                    raise PullError(f"{url} answered {reply.status}")
                return msgspec.json.decode(data, type=Pulled)
        except (
            aiohttp.ClientError,
            OSError,
            ValueError,
        ) as error:  # a timeout is an OSError, a decoding error a ValueError
            raise PullError(f"{url}: {error!r}") from error
