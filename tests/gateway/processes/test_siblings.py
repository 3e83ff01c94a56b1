"""Where processes ask each other."""

from pathlib import Path

import pytest

from ares.addresses import AddressError
from ares.gateway.processes.shared_counts import SharedCounts
from ares.gateway.processes.siblings import STATUS_ROUTE, SiblingRefusedError, Siblings


def test_a_temporary_directory_that_is_too_deep(tmp_path: Path) -> None:
    Siblings(Path("/tmp"), SharedCounts(2)).check()  # noqa: S108 - nothing is written there
    with pytest.raises(AddressError, match="set TMPDIR to a shorter one"):
        Siblings(tmp_path / ("x" * 100), SharedCounts(2)).check()


async def test_a_process_that_is_not_there_gives_no_answer(tmp_path: Path) -> None:
    siblings = Siblings(tmp_path, SharedCounts(3))
    assert await siblings.ask(1, STATUS_ROUTE) is None
    assert await siblings.ask_all(lambda process: f"{STATUS_ROUTE}?{process}") == {}
    with pytest.raises(SiblingRefusedError, match="does not answer; try again"):
        raise siblings.unavailable(1)
    await siblings.close()
