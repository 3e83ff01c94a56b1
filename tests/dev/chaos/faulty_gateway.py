"""`python -m tests.dev.chaos.faulty_gateway gateway ...`: the chaos suite's gateway with a fault that it is to find.

A request that has moved for the second time loses a token.
"""

from collections.abc import Coroutine
from typing import Any

import msgspec

from ares.gateway.pool.delta import Delta
from ares.gateway.session.output import Emit
from ares.gateway.session.session import Session
from ares_dev.chaos import gateway

run = Session.run


async def losing(self: Session, emit: Emit) -> None:
    lost = False

    def lossy(batch: list[Delta]) -> bool | Coroutine[Any, Any, bool]:
        nonlocal lost
        if self.moves != 2 or lost:
            return emit(batch)
        lost = True
        first, *others = batch
        return emit([msgspec.structs.replace(first, token_ids=(first.token_ids or [])[1:]), *others])

    await run(self, lossy)


Session.run = losing

if __name__ == "__main__":
    gateway.main()
