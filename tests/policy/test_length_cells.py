"""Cells by what is known of requests: which they are, and how many there may be."""

import numpy as np

from ares.policy import length_curves
from ares.policy.length_cells import LengthCells, request_keys
from ares.policy.length_curves import ALL, LAST


def median(cells: LengthCells, keys: tuple[int, ...]) -> float:
    longer, got = np.empty(len(LAST)), np.empty(1)
    length_curves.compose(cells.lengths, np.array(cells.find(keys), np.int64), longer)
    length_curves.expect(longer, 0, (0.5,), got)
    return float(got[0])


def test_requests_of_equal_length_and_template_have_equal_keys() -> None:
    keys = request_keys(100, (7, 8))
    assert keys == request_keys(101, (7, 8))
    assert not set(request_keys(100)) & set(request_keys(900))
    assert set(request_keys(100)) < set(keys)
    assert {7, 8} == set(keys) & set(request_keys(900, (7, 8)))
    assert len(set(keys)) == len(keys)


def test_an_empty_prompt_has_keys() -> None:
    assert request_keys(0) == request_keys(1)


def test_a_key_gets_a_cell_with_its_second_output() -> None:
    cells = LengthCells()
    cells.add((5,), 40)
    assert cells.find((5,)) == [ALL]
    cells.add((5,), 60)
    found = cells.find((5, 6))
    assert len(found) == 2
    assert cells.lengths.outputs[found[1]] == 2
    assert cells.lengths.outputs[ALL] == 2


def test_two_templates_separate_after_few_outputs() -> None:
    cells = LengthCells()
    for _ in range(4):
        cells.add(request_keys(100, (1,)), 40)
        cells.add(request_keys(100, (2,)), 1500)
    assert median(cells, request_keys(100, (1,))) < 60
    assert median(cells, request_keys(100, (2,))) > 1300
    assert 30 < median(cells, (999,)) < 1600


def test_keys_that_come_once_take_no_cell_and_little_memory() -> None:
    cells = LengthCells(8)
    for number in range(30_000):
        cells.add((1, 100 + number), 50)
        if number == 20_000:
            cells.add((2,), 70)
            cells.add((2,), 70)
    assert len(cells) == 2
    assert cells.find((1,)) != [ALL]
    cells.add((100,), 50)
    assert len(cells) == 2, "the first of 30,000 keys is forgotten"


def test_the_cell_without_an_output_for_longest_is_given_up() -> None:
    cells = LengthCells(3)
    for key in (1, 2, 3):
        cells.add((key,), 10)
        cells.add((key,), 10)
    cells.add((1,), 10)
    version = cells.version
    for _ in range(30):
        cells.add((4,), 900)
    assert cells.version > version
    assert len(cells) == 3
    assert cells.find((2,)) == [ALL]
    assert all(len(cells.find((key,))) == 2 for key in (1, 3, 4))
    assert median(cells, (4,)) > median(cells, (1,)), "nothing is left of the key that had the cell before"
    assert cells.lengths.outputs[cells.find((4,))[1]] == 30
