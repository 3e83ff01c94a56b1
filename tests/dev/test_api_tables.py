"""The page of the API has the fields and flags that the code takes."""

from pathlib import Path

import pytest

from ares_dev import api_tables

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_of_the_api_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert api_tables.filled(page) == page, "run python -m ares_dev api"
    assert api_tables.filled(page.replace("`top_k`", "`top`")) == page


def test_a_page_without_a_place() -> None:
    with pytest.raises(ValueError, match="no place <!-- flags -->"):
        api_tables.filled(PAGE.read_text().replace("<!-- flags -->", ""))
