"""Profiles, error models and recordings are read by the one rule for text: marked, packed, ended in every way."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ares.simulator.error_model_files import error_model
from ares.simulator.profile import ProfileError, load_profile
from ares.simulator.recording import read_recording
from ares.traces import TraceError
from tests.simulator.test_reference import small

LINE = {"input_toks": 5, "output_toks": 5, "arrival_time": 0, "queued_ts": 0, "first_token_ts": 1, "last_token_ts": 2}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_marked_and_packed_files_are_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()))
        return str(tmp_path / name)

    assert load_profile(write("profile.json", small(1600).model_dump_json(indent=2))) == small(1600)
    assert error_model(write("error.json", '{"start": 1,\n"end": 0, "tokens": 5}')).tokens == 5
    lines = [LINE, LINE | {"arrival_time": 1.5, "model": "a\u2028b"}]
    write("requests.jsonl", "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    write("meta.json", "{}")
    np.testing.assert_array_equal(read_recording(tmp_path).workload.arrival_s, [0, 1.5])


@pytest.mark.parametrize(
    "meta",
    ['{"preset": ["a"]}', '{"decode_instances": 0}', '{"decode_instances": "two"}', '{"prefill_instances": [1]}'],
)
def test_what_a_recording_cannot_have_run_on_is_refused(tmp_path: Path, meta: str) -> None:
    (tmp_path / "requests.jsonl").write_text(f"{json.dumps(LINE)}\n" * 2)
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(TraceError, match=r"meta\.json: (preset|decode_instances|prefill_instances) is "):
        read_recording(tmp_path)


def test_other_encodings_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("requests.jsonl", "meta.json"):
        (tmp_path / name).write_bytes("{}".encode("utf-16"))
    with pytest.raises(ProfileError, match=r"meta\.json: is UTF-16"):
        load_profile(str(tmp_path / "meta.json"))
    with pytest.raises(ValueError, match=r"meta\.json: is UTF-16"):
        error_model(str(tmp_path / "meta.json"))
    with pytest.raises(TraceError, match=r"requests\.jsonl: is UTF-16"):
        read_recording(tmp_path)
