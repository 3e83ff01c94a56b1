"""`python -m tests.dev.chaos.faulty_gateway gateway ...`: the chaos suite's gateway with a fault that it is to find.

A request that has moved for the second time loses a token.
"""

import msgspec

from ares.gateway.pool.generate import Delta
from ares.gateway.session.placement import Emit
from ares.gateway.session.session import Session
from ares_dev.chaos import gateway

give = Session._give
lost: set[str] = set()


async def losing(self: Session, batch: list[Delta], emit: Emit) -> bool:
    async def lossy(batch: list[Delta]) -> bool:
        first, *others = batch
        return await emit([msgspec.structs.replace(first, token_ids=(first.token_ids or [])[1:]), *others])

    if self.moves != 2 or self.id in lost:
        return await give(self, batch, emit)
    lost.add(self.id)
    return await give(self, batch, lossy)


Session._give = losing

if __name__ == "__main__":
    gateway.main()
