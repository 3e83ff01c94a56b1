"""The gateway's configuration: flags over variables over the file, and errors that name the setting."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from ares.config import ConfigError, load

MINIMAL = {"model": "m", "workers": ["http://a"]}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("ARES_"):
            monkeypatch.delenv(name)


def file(folder: Path, text: str) -> Path:
    path = folder / "gateway.yaml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = load(**MINIMAL)
    assert (config.host, config.port, config.preset) == ("127.0.0.1", 8000, "ares")
    assert config.admin_key is None
    assert config.handover_timeout_s < 30


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, "model: file\nworkers: [http://file]\nport: 1\nhost: file\n")
    monkeypatch.setenv("ARES_PORT", "2")
    monkeypatch.setenv("ARES_HOST", "variable")
    config = load(path, port=3)
    assert (config.model, config.host, config.port) == ("file", "variable", 3)
    assert config.workers == ["http://file"]


def test_a_flag_that_is_not_given_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_PORT", "2")
    assert load(**MINIMAL, port=None, host=None).port == 2


def test_lists_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_WORKERS", '["http://a", "http://b"]')
    assert load(model="m").workers == ["http://a", "http://b"]
    monkeypatch.setenv("ARES_WORKERS", "http://a")
    with pytest.raises(ConfigError, match="workers"):
        load(model="m")


def test_variables_of_other_commands_do_not_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_CACHE", "/somewhere")
    monkeypatch.setenv("ARES_URL", "http://x")
    assert load(**MINIMAL).port == 8000


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prot: 8000\n", "prot"),
        ("port: many\n", "port"),
        ("port: 70000\n", "port"),
        ("workers: []\n", "workers"),
        ("workers: [decode-0]\n", "workers"),
        ("workers: ['http://[']\n", "workers"),
        ("workers: ['http://a:99999']\n", "workers"),
        ("period_s: .inf\n", "period_s"),
        ("period_s: 0\n", "period_s"),
        ("handover_timeout_s: 25\n", "handover_timeout_s"),
        ("preset: fast\n", "preset"),
        ("max_body_bytes: 0\n", "max_body_bytes"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, named: str) -> None:
    flags = {name: value for name, value in MINIMAL.items() if name not in text}
    with pytest.raises(ConfigError, match=f"'{named}"):
        load(file(tmp_path, text), **flags)


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="'model'"):
        load(workers=["http://a"])
    with pytest.raises(ConfigError, match="'workers'"):
        load(model="m")


@pytest.mark.parametrize("text", ["model: [", "- a\n- b\n", "just text"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)):
        load(path, **MINIMAL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load(tmp_path / "nowhere.yaml", **MINIMAL)


def test_an_empty_file_is_fine(tmp_path: Path) -> None:
    assert load(file(tmp_path, ""), **MINIMAL).model == "m"


def test_presets_that_live_serving_cannot_carry_out_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"knows the true lengths.*live: off, .*ares"):
        load(**MINIMAL, preset="ares-oracle")
    assert load(**MINIMAL, preset="ares").preset == "ares"


def test_unknown_presets_list_the_known() -> None:
    with pytest.raises(ConfigError, match="static-rr"):
        load(**MINIMAL, preset="fast")


def test_the_key_is_not_shown() -> None:
    config = load(**MINIMAL, admin_key="secret")
    assert "secret" not in repr(config)
    assert config.admin_key is not None
    assert config.admin_key.get_secret_value() == "secret"


def test_a_resolved_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError):
        load(**MINIMAL).port = 1  # type: ignore[misc]
