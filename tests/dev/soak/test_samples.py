"""Samples are written as one list a figure, as long as the list of times."""

from ares_dev.soak.samples import Sample, columns


def test_a_figure_that_was_not_there_is_none() -> None:
    found = columns([Sample(0.04, False, {"b": 1.0}), Sample(5.01, True, {"a": 2.0, "b": 3.0})])
    assert found == {"at_s": [0.0, 5.0], "idle": [False, True], "a": [None, 2.0], "b": [1.0, 3.0]}
