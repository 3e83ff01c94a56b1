"""KV between two simulated instances: one HTTP request in place of a NIXL read.

`POST /simulate/pull` to the source names a pin. The source answers when the bytes would have arrived, frees the pin,
and tells the model's state after the pinned tokens. The target generates from that state: KV of other tokens than its
own makes it write other tokens than it should, as on a real engine. A lease that has ended, or an instance that has
restarted since, is an error here, where a real engine may read blocks that are somebody else's by now.
"""

from typing import Any

import aiohttp
import msgspec

from ares import addresses
from ares.mock_engine.settings import EngineSettings
from ares.protocol import fields

PULL_ROUTE = "/simulate/pull"
EXTEND_ROUTE = "/simulate/extend"
# Beside the transfer itself: a source that is silent for so long is taken for dead.
_PATIENCE_S = 10.0


class Pull(msgspec.Struct):
    """A wish for the KV of a pinned request; `keep_none`: only free it."""

    engine_id: str
    request_id: str
    keep_none: bool = False


class Pulled(msgspec.Struct):
    """What came: `tokens`, and the model's state after them."""

    tokens: int
    hash: int


class Extend(msgspec.Struct):
    """Pins whose lease shall begin anew."""

    engine_id: str
    request_ids: list[str]


class PullError(Exception):
    """The KV could not be pulled."""


def transfer_s(settings: EngineSettings, tokens: int) -> float:
    """Return the seconds that the KV of so many tokens is under way."""
    profile = settings.profile
    simulated = profile.latency_s + tokens * profile.kv_bytes_per_token / profile.bandwidth_bytes_s
    return simulated / settings.speed


class Puller:
    """The client of other instances' KV."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http

    async def pull(self, source: dict[str, Any], expected_s: float, *, keep_none: bool = False) -> Pulled:
        """Pull what vLLM's kv_transfer_params name, which should take so many seconds.

        Raises
        ------
        PullError
            The source is gone, silent, or does not hold it.
        """
        body = Pull(source[fields.REMOTE_ENGINE_ID], source[fields.REMOTE_REQUEST_ID], keep_none)
        return await self._post(source, PULL_ROUTE, body, expected_s)

    async def extend(self, source: dict[str, Any], request_ids: list[str]) -> None:
        """Tell a source that its pins are still wanted; PullError as in `pull`."""
        await self._post(source, EXTEND_ROUTE, Extend(source[fields.REMOTE_ENGINE_ID], request_ids))

    async def _post(self, source: dict[str, Any], route: str, body: msgspec.Struct, expected_s: float = 0.0) -> Pulled:
        host, port = source[fields.REMOTE_HOST], source[fields.REMOTE_PORT]
        url = f"http://{addresses.at(host, port)}{route}"
        limit = aiohttp.ClientTimeout(total=None, sock_connect=_PATIENCE_S / 2, sock_read=_PATIENCE_S + expected_s)
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
