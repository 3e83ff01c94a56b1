"""deploy/gateway.yaml has every setting, is up to date, and a gateway takes it."""

import re
from pathlib import Path

import pytest

from ares import config
from ares_dev import example_config

FILE = Path(__file__).parents[2] / "deploy" / "gateway.yaml"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})


def test_it_is_up_to_date() -> None:
    assert FILE.read_text() == example_config.example(), "run python -m ares_dev example-config"


def test_a_gateway_takes_it() -> None:
    loaded = config.load(FILE)
    assert loaded.model_dump() == config.GatewayConfig(model=loaded.model, workers=loaded.workers).model_dump()


def test_it_has_every_setting_and_what_it_means() -> None:
    text = FILE.read_text()
    assert re.findall(r"^(?:# )?(\w+): ", text, re.MULTILINE) == [*config.GatewayConfig.model_fields]
    assert not re.findall(r"^\n(?:# )?\w+: ", text, re.MULTILINE)  # each below a comment


def test_every_default_is_a_value_that_is_taken(tmp_path: Path) -> None:
    """With all comments of defaults taken away; not those of examples, whose files do not exist here."""
    lines = FILE.read_text().splitlines()
    given = [line.removeprefix("# ") for line in lines if re.match(r"(# )?\w+: ", line) and "  # e.g." not in line]
    file = tmp_path / "gateway.yaml"
    file.write_text("\n".join(given))
    assert config.load(file).model_dump() == config.load(FILE).model_dump()
