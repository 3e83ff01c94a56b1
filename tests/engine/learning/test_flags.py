"""The options of an instance about learning."""

import stat
from pathlib import Path
from typing import Any

import pytest

from ares.engine.learning.flags import LearningError, LearningFlags


def check(given: LearningFlags, predictor: str | None = None, **others: Any) -> None:
    given.check(predictor, **{"records_by_hand": False, "connector": "ares", "flags": [], **others})


def test_it_learns_where_it_is_asked_to() -> None:
    assert LearningFlags(learn=True).learns(None)
    assert LearningFlags().learns("learn")
    assert not LearningFlags().learns(None)
    assert not LearningFlags(learn=False).learns("none")
    for predictor in (None, "learn", "file.safetensors"):
        check(LearningFlags(learn=True), predictor)
    check(LearningFlags(), "learn")
    check(LearningFlags(), None, records_by_hand=True, connector="stock", flags=["--worker-cls", "x"])


@pytest.mark.parametrize(
    ("flags", "predictor", "others", "message"),
    [
        (LearningFlags(folder=Path("x")), None, {}, "--learn-folder changes nothing without --learn"),
        (LearningFlags(record_at_once=4), None, {}, "--record-at-once changes nothing without --learn"),
        (LearningFlags(record_token_ids=True), None, {"records_by_hand": True}, "--record-token-ids.*always records"),
        (LearningFlags(learn=False, record_at_once=4), None, {}, "--record-at-once changes nothing"),
        (LearningFlags(learn=False), "learn", {}, "--predictor learn and --no-learn contradict"),
        (LearningFlags(learn=True), "none", {}, "--predictor none and --learn contradict"),
        (LearningFlags(learn=True), None, {"records_by_hand": True}, "leave --record-hidden-states out"),
        (LearningFlags(learn=True), None, {"flags": ["--worker-cls=x"]}, "--worker-cls and --learn exclude"),
        (LearningFlags(), "learn", {"connector": "stock"}, "connector 'stock'"),
    ],
)
def test_what_has_no_effect_is_refused(
    flags: LearningFlags, predictor: str | None, others: dict[str, Any], message: str
) -> None:
    with pytest.raises(LearningError, match=message):
        check(flags, predictor, **others)


def test_two_instances_do_not_share_a_folder(tmp_path: Path) -> None:
    flags = LearningFlags(learn=True, folder=tmp_path / "new")
    held = flags.open_folder("m", "decode-0")
    assert held.folder.recorded.is_dir()
    assert stat.S_IMODE(held.folder.path.stat().st_mode) == 0o700
    with pytest.raises(LearningError, match="of an instance that runs"):
        flags.open_folder("m", "decode-1")
    held.lock.release()
    flags.open_folder("m", "decode-1").lock.release()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(LearningError, match=r"cannot be written.*give another --learn-folder"):
        LearningFlags(learn=True, folder=tmp_path / "file" / "x").open_folder("m", "decode-0")
