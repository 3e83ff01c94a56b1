"""`ares predictor` as a user runs it, without an engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ares.predictor import prompts, structured
from ares.predictor.errors import PredictorError
from tests.predictor.synthetic import folder


def run(*arguments: object, status: int = 0) -> str:
    command = [sys.executable, "-m", "ares", "predictor", *map(str, arguments)]
    # A wide terminal: errors are wrapped at its width.
    environment = {**os.environ, "COLUMNS": "1000"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_from_data_to_a_report(tmp_path: Path) -> None:
    data, trained, result = folder(tmp_path / "data"), tmp_path / "p.safetensors", tmp_path / "r.json"
    run("train", "--data", data, "--out", trained, "--epochs", 3, "--members", 1)
    assert json.loads(trained.with_suffix(".json").read_text())["settings"]["epochs"] == 3
    baselines = "global-median,residual-life,max-tokens,prompt-only,prompt-only-conditional"
    floor = tmp_path / "floor.json"
    from ares.predictor import dataset
    from ares.predictor.floor import choose

    pairs = dataset.load(data)
    rows = choose(pairs, 4)
    floor.write_text(
        json.dumps(
            {
                "sampling": pairs.source.sampling,
                "prefixes": [
                    {
                        "request": pairs.requests[pairs.output[n]],
                        "position": int(pairs.position[n]),
                        "room": int(pairs.room[n]),
                        "remaining": [5, 9, 20],
                    }
                    for n in rows
                ],
            }
        )
    )
    arguments = ("--data", data, "--checkpoint", trained, "--baselines", baselines, "--noise-floor", floor)
    run("evaluate", *arguments, "--json", result, "--report", tmp_path / "report")
    read = json.loads(result.read_text())
    assert [model["name"] for model in read["models"]] == ["ours", *baselines.split(",")]
    for model in read["models"]:
        assert {"mae", "relative_mae", "crps", "parameters", "p90_coverage", "by_position"} <= model.keys()
    assert read["noise_floor"]["prefixes"] == 4
    assert len(list((tmp_path / "report").glob("*.png"))) == 3
    # A request's limit is at least what it generated: this baseline never says too little.
    unbounded = next(m for m in read["models"] if m["name"] == "max-tokens")
    assert unbounded["p90_coverage_at_or_below"] == 1.0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no prompts"),
        ("{", "not JSON"),
        ('{"no": 1}', "no prompt"),
        ("[]", "no prompt"),
        ('{"turns": []}', "no prompt"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(PredictorError, match=said):
        prompts.read([file])


def test_bad_input_ends_with_status_2(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("{")
    assert "prompts.jsonl:1: not JSON" in run("collect", "--prompts", file, "--out", tmp_path / "d", status=2)
    assert "no shards" in run("train", "--data", tmp_path, "--out", tmp_path / "p", status=2)
    said = run("evaluate", "--data", tmp_path, "--checkpoint", file, "--baselines", "none", status=2)
    assert "not a whole checkpoint" in said


def test_prompts_are_read_in_every_shape_and_each_once(tmp_path: Path) -> None:
    jsonl, plain = tmp_path / "a.jsonl", tmp_path / "b.txt"
    rows = [{"question": "one"}, {"prompt": "two"}, {"turns": ["three", "x"]}, {"question": "one"}]
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    plain.write_text("three\n\nfour\n")
    assert {p.text for p in prompts.read([jsonl, plain])} == {"one", "two", "three", "four"}
    assert prompts.read([jsonl, plain], 1) == prompts.read([jsonl, plain], 1)


def test_structured_prompts_ask_for_what_they_say() -> None:
    tasks = structured.generate(200, list(structured.KINDS))
    assert len({task.prompt for task in tasks}) == len(tasks) == 200
    assert {task.kind for task in tasks} == structured.KINDS.keys()
    for task in tasks:
        if task.kind == "copy":
            assert task.answer in task.prompt
        if task.kind == "count":
            assert task.answer.split(", ")[-1] in task.prompt
    assert structured.follows(100, 114)
    assert not structured.follows(100, 116)
