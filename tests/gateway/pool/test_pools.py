"""Which of several models an instance serves, by what it says of itself."""

from collections.abc import AsyncIterator

import pytest

from ares.gateway.pool.discovery import Served
from ares.gateway.pool.generate import http_client
from ares.gateway.pool.pool import Pool
from ares.gateway.pool.pools import Pools
from ares.protocol import messages

URL = "http://h:1"
SIZES = ({"vocab_size": 10}, {"vocab_size": 20}, {"vocab_size": 20})
NAMES = (("one", "org/one"), ("org/two",), ("/models/three",))


class Models:
    """Three models; the pools are not started, so that nobody is asked."""

    def __init__(self, pools: Pools, served: list[Served]) -> None:
        self.pools, self.served = pools, served

    def place(self, *names: str, vocabulary: int | None = None) -> tuple[int, str | None]:
        """Take what an instance says, as the pool does that has it; return its pool then, and why it is not used."""
        shape = {} if vocabulary is None else {"vocab_size": vocabulary}
        found = messages.Description("decode-0", "decode", "boot", "tcp://h:2", list(names), shape, [])
        served = self.served[self.where]
        why = None if served.elsewhere(URL, found) else served.difference(found)
        return self.where, why

    @property
    def where(self) -> int:
        """Number of the one pool that has the instance."""
        (number,) = (n for n, pool in enumerate(self.pools) if pool.at(URL) is not None)
        return number


@pytest.fixture
async def models() -> AsyncIterator[Models]:
    pools = Pools()
    served = [Served(names, shape, pools) for names, shape in zip(NAMES, SIZES, strict=True)]
    async with http_client() as http:
        for one in served:
            pools.append(one, Pool([], http, 0.1))
        pools.add(URL, "a test names it")
        yield Models(pools, served)


async def test_an_instance_goes_by_its_name_and_else_by_what_it_can_be(models: Models) -> None:
    assert models.place("ORG/one", "other") == (0, None)
    assert models.place("org/two", vocabulary=20) == (1, None)
    # A folder is the model of that folder.
    assert models.place("/models/three") == (2, None)
    # Of names that are folders elsewhere, the numbers of the configuration may leave one model.
    assert models.place("/elsewhere", vocabulary=10) == (0, None)


async def test_what_may_be_any_model_or_is_none_is_not_used_and_stays(models: Models) -> None:
    assert models.place("org/three", vocabulary=30) == (0, "org/three instead of one of one, org/two, /models/three")
    known = "one, org/two, /models/three"
    assert models.place() == (
        0,
        f"it does not report which model it serves (an earlier ARES?); here it may be any of {known}",
    )
    # A name does not help where the numbers differ.
    assert models.place("one", vocabulary=30)[1] is not None


async def test_what_is_removed_leaves_whichever_pool_has_it(models: Models) -> None:
    assert models.place("org/two") == (1, None)
    models.pools.add(URL, "another source names it")
    assert models.where == 1
    models.pools.remove(URL, "no source names it", 1.0)
    assert [instance.leaving for instance in models.pools.instances()] == [True]
    models.pools.add(URL, "it is back")
    assert models.where == 1
    assert [instance.leaving for instance in models.pools.instances()] == [False]
