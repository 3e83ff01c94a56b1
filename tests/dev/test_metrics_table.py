"""docs/metrics.md has every metric as the gateway has it."""

from pathlib import Path

import pytest

from ares_dev import metrics_table

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == metrics_table.filled(PAGE.read_text()), "run python -m ares_dev metrics"


def test_a_row_has_type_labels_and_text() -> None:
    said = "Requests answered with an error, or whose stream ended with one"
    row = f"| `ares_http_refused_total` (counter) | `route`, `status`, `reason` | {said} |"
    assert row in metrics_table.table().splitlines()
    assert all(metric.samples for metric in metrics_table.exported())


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        metrics_table.filled("# Metrics")
