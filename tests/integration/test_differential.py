"""The gateway's replies are vLLM's own, for each request of a table (`python -m ares_dev differential` runs more)."""

from ares_dev.differential import bodies
from ares_dev.differential.compare import compare, compare_moved
from tests.integration.client import Client


async def test_replies_are_those_of_an_instance(client: Client) -> None:
    status = await client.status()
    instance = next(row["url"] for row in status["instances"] if row["name"] == "decode-0")
    requests = bodies.table()
    found = await compare(client.http, client.url, instance, client.model, requests)
    assert not found.different
    # Every reason still holds.
    assert found.stale == []


async def test_no_move_can_be_seen_in_a_tool_call(client: Client) -> None:
    # A grammar makes the random model call tools: the long arguments are moved in their middle.
    chosen = {n: r for n, r in bodies.table(["tools"]).items() if r[1].get("tool_choice") not in (None, "auto", "none")}
    found = await compare_moved(client.http, client.url, client.model, chosen)
    assert not found.different
    assert found.moves["moved"] >= len(chosen) // 2
