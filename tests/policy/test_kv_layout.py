"""How many KV blocks a request holds over the groups of its model."""

import pytest

from ares.policy.kv_layout import KvGroup, KvLayout

B = 16
FULL, WINDOW = KvGroup(B), KvGroup(B, window=40)
GEMMA = KvLayout.of(B, [FULL, *[WINDOW] * 5])


@pytest.mark.parametrize(
    ("group", "tokens", "blocks"),
    [
        (FULL, 0, 0),
        (FULL, 1, 1),
        (FULL, 16, 1),
        (FULL, 17, 2),
        (WINDOW, 0, 0),
        (WINDOW, 40, 3),
        (WINDOW, 55, 4),
        (WINDOW, 56, 3),  # 16 tokens lie before the window: the first block is given back
        (WINDOW, 1000, 3),
        (WINDOW, 1009, 4),
        (KvGroup(B, fixed_blocks=2), 0, 0),
        (KvGroup(B, fixed_blocks=2), 1000, 2),
    ],
)
def test_blocks_of_a_group(group: KvGroup, tokens: int, blocks: int) -> None:
    assert group.blocks(tokens) == blocks


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 64])
def test_the_most_while_it_grows_is_the_largest_on_the_way(window: int) -> None:
    group = KvGroup(B, window=window)
    for tokens in range(1, 200, 7):
        for longest in range(tokens, 300, 11):
            on_the_way = max(group.blocks(n) for n in range(tokens, longest + 1))
            most = group.most_blocks(tokens, longest)
            # Past the window it may be counted with the one block that it holds only for a part of each cycle.
            assert on_the_way <= most <= on_the_way + (longest > window)


def test_one_group_that_grows_counts_tokens_as_they_are() -> None:
    for plain in (KvLayout(B), KvLayout.of(B, []), KvLayout.of(B, [FULL])):
        assert plain == KvLayout(B)
        assert [plain.kv_tokens(n, 500) for n in (0, 1, 16, 999)] == [0, 1, 16, 999]
        assert [plain.blocks(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
        assert plain.capacity_tokens(100) == 1600


def in_blocks(tokens: int) -> int:
    """As policies round: whole blocks, the next token included."""
    return -(-(tokens + 1) // B)


@pytest.mark.parametrize(
    "groups",
    [
        [FULL, WINDOW],
        [FULL, *[WINDOW] * 5],
        [FULL, KvGroup(B, window=100), KvGroup(B, window=40)],
        [FULL, KvGroup(B, fixed_blocks=3)],
        [FULL, FULL],
    ],
)
def test_what_a_policy_counts_in_blocks_is_what_is_held(groups: list[KvGroup]) -> None:
    layout = KvLayout.of(B, groups)
    growing = sum(not group.is_bounded for group in groups)
    for tokens in range(1, 300):
        assert in_blocks(layout.kv_tokens(tokens)) * growing == sum(group.blocks(tokens + 1) for group in groups)
        assert layout.blocks(tokens) == sum(group.blocks(tokens) for group in groups)


def test_capacity_and_requests_are_in_one_unit() -> None:
    """A pool that k requests of the same length fill is full by the policy's count, too, and not before."""
    for tokens in (10, 100, 1000):
        each = GEMMA.blocks(tokens + 1)
        assert 7 * in_blocks(GEMMA.kv_tokens(tokens)) * B == GEMMA.capacity_tokens(7 * each)


def test_a_short_request_counts_with_what_its_windows_will_hold() -> None:
    short = 10
    assert GEMMA.kv_tokens(short) == short + 5 * B
    assert GEMMA.kv_tokens(short, 10) == short + 5 * 2 * B
    assert GEMMA.kv_tokens(short, 10_000) == short + 5 * 4 * B
    assert GEMMA.kv_tokens(10_000, 10_000) == 10_000 + 5 * 4 * B


def test_without_a_group_that_grows_only_the_bounded_ones_count() -> None:
    layout = KvLayout.of(B, [KvGroup(B, fixed_blocks=2)])
    assert layout.kv_tokens(5000) == 2 * B
    assert layout.capacity_tokens(10) == 10 * B


def test_groups_may_have_blocks_of_other_sizes() -> None:
    layout = KvLayout.of(32, [KvGroup(32), KvGroup(16)])
    assert layout.blocks(33) == 2 + 3
    assert layout.capacity_tokens(30) == 320  # of 3 blocks for every 32 tokens
