"""Settings of the learner: from a file, variables and flags, refused by name where they are wrong."""

from pathlib import Path

import pytest

from ares.learner.errors import LearnerError
from ares.learner.settings import Keys, LearnerSettings, assignments, load

GIVEN = {"folder": "learner", "workers": ["http://127.0.0.1:8100/"]}


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "learner.yaml"
    file.write_text("threads: 2\nfirst_outputs: 50\nlooks: [10, 20]\n")
    monkeypatch.setenv("ARES_LEARNER_FIRST_OUTPUTS", "60")
    found = load(file, GIVEN | assignments(["learner.growth=0.25", "pause-s=5"]))
    assert (found.threads, found.first_outputs, found.looks) == (2, 60, [10, 20])
    assert (found.growth, found.pause_s, found.workers) == (0.25, 5.0, ["http://127.0.0.1:8100"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folder": "learner"}, "nothing to learn from: give --gateway URL"),
        ({"workers": ["http://a"]}, "'folder' is missing: give --folder, ARES_LEARNER_FOLDER"),
        (GIVEN | {"thread": 2}, "'thread' is unknown; did you mean threads"),
        (GIVEN | {"looks": [20, 10]}, "must rise"),
        (GIVEN | {"gateways": ["localhost:8000"]}, "is not a base URL"),
        (GIVEN | {"nice": 40}, "'nice'"),
        (GIVEN | {"threads": True}, "'threads': true and false are no values"),
        (GIVEN | {"pause_s": True}, "'pause_s': true and false are no values"),
        (GIVEN | {"looks": [True, 5]}, "'looks': true and false are no values"),
        (GIVEN | {"window_outputs": 100}, "window_fewest cannot be more"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(LearnerError, match=message):
        load(None, given)


def test_unknown_variables_are_refused_but_not_those_of_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_LEARNER_SERVICE_HOST", "10.0.0.1")
    assert load(None, GIVEN).threads == 1
    monkeypatch.setenv("ARES_LEARNER_THREAD", "2")
    with pytest.raises(LearnerError, match="did you mean ARES_LEARNER_THREADS"):
        load(None, GIVEN)


@pytest.mark.parametrize(
    "text", ["threads", "=2", "threads=[1", "threads=!!bool now", "threads=!!int x", "threads=" + "[" * 5000]
)
def test_assignments_that_are_none(text: str) -> None:
    with pytest.raises(LearnerError, match="--set"):
        assignments([text])


def test_a_file_that_is_no_settings(tmp_path: Path) -> None:
    with pytest.raises(LearnerError, match="no such file"):
        load(tmp_path / "none.yaml", GIVEN)
    for text in ("- a\n- b\n", "threads: !!bool now", "[" * 5000):
        (tmp_path / "list.yaml").write_text(text)
        with pytest.raises(LearnerError, match=r"list.yaml: should be lines such as"):
            load(tmp_path / "list.yaml", GIVEN)


def test_keys_come_from_the_variables_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARES_ADMIN_KEY", "a secret")
    keys = Keys()
    assert keys.admin_key is not None
    assert keys.admin_key.get_secret_value() == "a secret"
    assert "secret" not in repr(keys)


def test_every_setting_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "learning.md").read_text()
    assert [name for name in LearnerSettings.model_fields if f"`{name}`" not in page] == []
