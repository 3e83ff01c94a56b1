"""The `ares predictor` commands: from prompts to a predictor of remaining output length."""

import importlib.util
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ares import extras
from ares.bench.options import JsonFile, Model
from ares.cli import learner
from ares.models.resolve import DEFAULT_MODEL
from ares.predictor.errors import PredictorError
from ares.terminal import tables
from ares.terminal.output_files import check_folder, check_writable
from ares.terminal.progress import progress_display

if TYPE_CHECKING:
    from ares.engine.prediction.collect import Generator

app = typer.Typer(
    help="Train and evaluate a predictor of remaining output length, on the model's own hidden states.",
    no_args_is_help=True,
)
_errors = Console(stderr=True)

# Outputs in one shard: enough for quick reading, few enough that an interrupted run loses little.
_SHARD_OUTPUTS = 64

Data = Annotated[Path, typer.Option(help="Data folder that `ares predictor collect` wrote.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1, help="Top-p of the sampling.")]
Batch = Annotated[int, typer.Option(min=1, help="Concurrent requests.")]
Minutes = Annotated[float | None, typer.Option(min=0.1, help="Start no more outputs after this many minutes.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]


@app.callback()
def predictor() -> None:
    """Train and evaluate a predictor of remaining output length, on the model's own hidden states."""


def _note(text: str) -> None:
    _errors.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def _deadline(minutes: float | None) -> float:
    """Return the time (`time.monotonic`) after which no more outputs are started."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def _check(*outputs: Path | None) -> None:
    """Raise PredictorError for output files that cannot be written, before the work begins."""
    for path in outputs:
        try:
            if path is not None:
                check_writable(path)
        except OSError as error:
            raise PredictorError(f"{path}: cannot be written: {error}") from error


@app.command()
def structured(
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Prompts.")] = 2000,
    kind: Annotated[list[str] | None, typer.Option(help="Kind of prompts; repeat for several.")] = None,
    seed: Seed = 0,
) -> None:
    """Write prompts whose answers have a known length."""
    from ares.predictor import structured as tasks

    _check(out)
    if unknown := set(kind or ()) - tasks.KINDS.keys():
        raise PredictorError(f"unknown kind {', '.join(sorted(unknown))}: {', '.join(tasks.KINDS)}")
    rows = tasks.generate(count, kind or tasks.FOLLOWED, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({"prompt": t.prompt, "kind": t.kind, "answer": t.answer}) + "\n" for t in rows))


@app.command()
def followed(
    prompts: Annotated[Path, typer.Option(help="File that `ares predictor structured` wrote.")],
    data: Data,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
) -> None:
    """Show which kinds of structured prompts the model follows."""
    from transformers import AutoTokenizer

    from ares.bench.environment import describe
    from ares.models import resolve as models
    from ares.predictor import dataset, shards, structured
    from ares.predictor.prompts import Prompt
    from ares.text_files import read_lines

    _check(json_file)
    try:
        rows = [json.loads(line) for line in read_lines(prompts) if line.strip()]
        asked = {Prompt.of(row["prompt"]).id: (row["kind"], row["answer"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise PredictorError(f"{prompts}: not what ares predictor structured writes: {error!r}") from error
    pairs = dataset.load(data)
    tokenizer = AutoTokenizer.from_pretrained(str(models.resolve(pairs.source.model, weights=False, console=_errors)))
    lengths = []
    for output, prompt in enumerate(pairs.prompts):
        if prompt in asked:
            kind, answer = asked[prompt]
            # A stop token ends the answer.
            cut = pairs.outcomes[output] is not shards.Outcome.STOP
            lengths.append((kind, len(tokenizer.encode(answer)) + 1, int(pairs.lengths[output]), cut))
    table = tables.table("kind", "outputs", "followed", "cut", "longest answer")
    result = structured.summary(lengths)
    for row in result:
        shares = (f"{row[name]:.0%}" for name in ("followed", "cut"))
        table.add_row(row["kind"], str(row["outputs"]), *shares, str(row["longest_answer"]))
    tables.show(table)
    if json_file is not None:
        _write_json(json_file, {"sampling": pairs.source.sampling, "kinds": result, **describe()})


@app.command()
def collect(
    prompts: Annotated[list[Path], typer.Option(help="Prompt file: JSONL or one prompt a line; repeat for several.")],
    out: Annotated[Path, typer.Option(help="Data folder; an incomplete one is continued.")],
    model: Model = DEFAULT_MODEL,
    limit_prompts: Annotated[int | None, typer.Option(min=1, help="Take this many prompts, after shuffling.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Outputs for each prompt.")] = 1,
    every: Annotated[int, typer.Option(min=1, help="Tokens between two recorded hidden states.")] = 20,
    limit: Annotated[int, typer.Option(min=1, help="Maximum tokens of an output.")] = 1024,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    system_prompt: Annotated[str | None, typer.Option(help="System prompt in front of every prompt.")] = None,
    batch: Batch = 64,
    minutes: Minutes = None,
    seed: Seed = 0,
) -> None:
    """Generate with vLLM and store the hidden states of every k-th token with the remaining length."""
    extras.require("vllm")

    from ares.engine.prediction.collect import GenerationSettings, Generator
    from ares.models import resolve as models
    from ares.predictor import dataset, shards
    from ares.predictor import prompts as prompt_files

    until = _deadline(minutes)
    chosen = [prompt.behind(system_prompt) for prompt in prompt_files.read(prompts, seed, _note)[:limit_prompts]]
    names = [(prompt, f"{prompt.id}.{sample}") for sample in range(samples) for prompt in chosen]
    done: set[str] = set()
    known = {prompt.id for prompt in chosen}
    if shards.files(out):
        sampling = shards.sampling(temperature, top_p)
        # The hidden size is known from the engine, below.
        shards.same_source(out, replace(shards.source(out), model=model, every=every, limit=limit, sampling=sampling))
        for shard in shards.read_all(out):
            done |= set(shard.requests)
            known |= set(shard.prompts)
    if short := dataset.too_few_prompts(known):
        _note(short)
    missing = [(prompt, name) for prompt, name in names if name not in done]
    if not missing:
        _errors.print(f"{out}: all {len(names)} outputs are there")
        return
    shards.writable(out)
    folder = models.resolve(model, console=_errors)
    # Another seed for the rest: with the same one the engine would draw the random numbers of the first part again.
    settings = GenerationSettings(model, folder, temperature, top_p, limit, batch, every, seed + len(done))
    generator = Generator(settings)
    source = shards.Source(model, generator.hidden_size, every, limit, settings.sampling)
    if done:
        shards.same_source(out, source)
    todo = [shards.Output(name, prompt.id, generator.chat(prompt.text, system_prompt)) for prompt, name in missing]
    fitting = [output for output in todo if generator.has_room(output)]
    if len(fitting) < len(todo):
        _note(f"{len(todo) - len(fitting)} prompts are as long as the model's context, and are left out")
    full: list[shards.Output] = []
    for output in _generated(generator, fitting, None, until):
        full.append(output)
        if len(full) == _SHARD_OUTPUTS:
            shards.write(out, source, full)
            full = []
    if full:
        shards.write(out, source, full)


def _generated(generator: "Generator", todo: list[Any], limits: list[int] | None, until: float) -> Any:
    """Yield the outputs as they end, with a progress bar."""
    columns = (TextColumn("outputs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress_display(_errors, *columns, TextColumn("{task.fields[rate]}")) as progress:
        task = progress.add_task("outputs", total=len(todo), rate="")
        started = time.monotonic()
        for output, tokens in generator.run(todo, limits, until):
            progress.update(task, advance=1, rate=f"{tokens / (time.monotonic() - started):.0f} tokens/s")
            yield output


@app.command("noise-floor")
def noise_floor(
    data: Data,
    json_file: Annotated[
        Path,
        typer.Option("--json", help="Write the continuations and the floor here; an existing file is continued."),
    ],
    prefixes: Annotated[int, typer.Option(min=2, help="Prefixes of test outputs.")] = 48,
    continuations: Annotated[int, typer.Option(min=2, help="Continuations of each prefix.")] = 16,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    batch: Batch = 64,
    minutes: Minutes = None,
    seed: Seed = 0,
) -> None:
    """Sample many continuations of the same prefix: the least error that any predictor can have.

    The sampling must be that of the data.
    """
    extras.require("vllm")

    import numpy as np

    from ares.bench.environment import describe
    from ares.engine.prediction.collect import GenerationSettings, Generator
    from ares.models import resolve as models
    from ares.predictor import dataset, floor, shards

    until = _deadline(minutes)
    _check(json_file)
    pairs = dataset.load(data)
    pairs.require_token_ids("the noise floor")
    source = pairs.source
    if shards.sampling(temperature, top_p) != source.sampling:
        raise PredictorError(
            f"{data} was sampled with {source.sampling}, not {shards.sampling(temperature, top_p)}: use the same here"
        )
    drawn: list[floor.Prefix] = []
    if json_file.exists():
        drawn, sampling = floor.read(json_file)
        if sampling != source.sampling or not {p.request for p in drawn} <= set(pairs.requests):
            raise PredictorError(f"{json_file} was drawn from other data: write to another file")
    rows = floor.choose(pairs, prefixes, seed, drawn)
    if len(rows) + len(drawn) < 2:
        raise PredictorError(
            f"{data}: {len(rows)} prefixes in the test set (15 % of its prompts): collect more prompts"
        )
    folder = models.resolve(source.model, console=_errors)
    settings = GenerationSettings(source.model, folder, temperature, top_p, source.limit, batch, 0, seed + len(drawn))
    todo, limits = [], []
    for row in rows.tolist():
        output, position = int(pairs.output[row]), int(pairs.position[row])
        tokens = [*pairs.prompt_tokens[output].tolist(), *pairs.output_tokens[output][:position].tolist()]
        todo += [shards.Output(f"{row}.{n}", pairs.prompts[output], tokens) for n in range(continuations)]
        limits += [int(pairs.room[row])] * continuations
    lengths: dict[int, list[int]] = {}
    for output in _generated(Generator(settings), todo, limits, until) if todo else ():
        lengths.setdefault(int(output.request.split(".")[0]), []).append(len(output.output_tokens))
    drawn += [
        floor.Prefix(
            pairs.requests[pairs.output[row]], int(pairs.position[row]), int(pairs.room[row]), tuple(lengths[row])
        )
        for row in rows.tolist()
        if len(lengths.get(row, ())) == continuations
    ]
    if len(drawn) < 2:
        raise PredictorError("fewer than two prefixes were completed: give it more --minutes")
    _, prompts = np.unique([pairs.prompts[pairs.requests.index(p.request)] for p in drawn], return_inverse=True)
    result = {"noise_floor": floor.summary(drawn, prompts), "sampling": source.sampling, **describe()}
    result["prefixes"] = [
        {"request": p.request, "position": p.position, "room": p.room, "remaining": list(p.remaining)} for p in drawn
    ]
    _write_json(json_file, result)
    floor_row = result["noise_floor"]
    Console().print(f"least MAE {floor_row['mae']:.1f}, least CRPS {floor_row['crps']:.1f} over {len(drawn)} prefixes")


@app.command()
def train(
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Checkpoint to write; a JSON file of the same name describes its training.")
    ],
    arch: Annotated[str, typer.Option(help="ours or paper.")] = "ours",
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Maximum epochs.")] = 100,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without improvement before training stops.")] = 10,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Learning rate.")] = None,
    members: Annotated[
        int | None, typer.Option(min=1, help="Networks whose distributions are averaged (ours); 4 by default.")
    ] = None,
) -> None:
    """Train on 70 % of the prompts, with early stopping on another 15 %; 80 prompts or more are needed."""
    extras.require("torch")

    from ares.bench.environment import describe
    from ares.predictor import checkpoint as checkpoints
    from ares.predictor import dataset
    from ares.predictor.training import settings_of, train

    settings = settings_of(arch, seed=seed, epochs=epochs, patience=patience, members=members, rate=rate)
    described_in = out.with_suffix(".json")
    if out == described_in:
        raise PredictorError(
            f"{out}: the checkpoint's own JSON has that name: give another, such as {out.stem}.safetensors"
        )
    _check(out, described_in)
    pairs = dataset.load(data)
    if short := dataset.too_few_prompts(pairs.pair_prompts):
        raise PredictorError(f"{data}: {short}")
    columns = (TextColumn("epoch {task.completed}"), TextColumn("{task.fields[shown]}"))
    with progress_display(_errors, *columns) as progress:
        task = progress.add_task("epochs", total=epochs, shown="")

        def on_epoch(entry: dict[str, float]) -> None:
            shown = f"validation MAE {entry['validation_mae']:.1f}, CRPS {entry['validation_crps']:.1f}"
            progress.update(task, advance=1, shown=shown)

        trained, report = train(pairs, settings, on_epoch)
    checkpoints.save(out, trained)
    described = {"model": trained.model, "sampling": pairs.source.sampling, "limit": trained.limit, **describe()}
    _write_json(described_in, described | report)


@app.command()
def evaluate(
    data: Data,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to evaluate.")],
    paper: Annotated[Path | None, typer.Option(help="Checkpoint of --arch paper to compare with.")] = None,
    baselines: Annotated[str, typer.Option(help="all, none, or names separated by commas.")] = "all",
    noise_floor: Annotated[Path | None, typer.Option(help="File that `ares predictor noise-floor` wrote.")] = None,
    json_file: JsonFile = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
    seed: Seed = 0,
) -> None:
    """Evaluate a checkpoint on the test prompts, with the baselines and the noise floor."""
    extras.require(
        "torch", "scipy", *(["matplotlib"] if report is not None else []), install=extras.command("predictor")
    )

    from ares.bench.environment import describe
    from ares.cli.predictor_evaluate import Comparison, chosen_baselines

    names = chosen_baselines(baselines)
    _check(json_file)
    _need("scipy", *(["matplotlib"] if report is not None else []))
    if report is not None:
        _check_folder(report)
    checkpoints = {"ours": checkpoint} | ({"paper": paper} if paper is not None else {})
    comparison = Comparison(data, checkpoints, noise_floor, seed)
    obstacles = comparison.obstacles(names)
    if obstacles and baselines != "all":
        raise PredictorError("; ".join(f"baseline {name}: {why}" for name, why in obstacles.items()))
    for name, why in obstacles.items():
        _note(f"without {name}: {why}")
        comparison.skip(name, why)
    for name in names:
        if name not in obstacles:
            _errors.print(f"fitting {name}")
            comparison.add_baseline(name)
    result = comparison.report() | {"data": comparison.describe(), **describe()}
    if json_file is not None:
        _write_json(json_file, result)
    if report is not None:
        comparison.draw(report, result)
    show(result)


def _need(*packages: str) -> None:
    """Raise PredictorError if a package that is needed later is missing."""
    if absent := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise PredictorError(f"it needs {', '.join(absent)}: pip install '.[predictor]' in ARES's checkout")


def _check_folder(folder: Path) -> None:
    try:
        check_folder(folder)
    except OSError as error:
        raise PredictorError(f"{folder}: cannot be written: {error}") from error


@app.command("time")
def time_again(
    json_file: Annotated[
        Path, typer.Option("--json", help="Result of `ares predictor evaluate`, whose times are updated.")
    ],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of ours.")],
    paper: Annotated[Path | None, typer.Option(help="Checkpoint of --arch paper.")] = None,
) -> None:
    """Measure the microseconds of a prediction again, on an idle machine, and update them in an evaluation."""
    extras.require("torch")

    from ares.predictor import auxiliary, timing
    from ares.predictor import checkpoint as checkpoints
    from ares.text_files import read_text

    try:
        result = json.loads(read_text(json_file))
        models = {model["name"]: model for model in result["models"]}
    except (ValueError, KeyError, TypeError) as error:
        raise PredictorError(f"{json_file}: not what ares predictor evaluate writes: {error}") from error
    _check(json_file)
    if absent := ({"ours"} | ({"paper"} if paper is not None else set())) - models.keys():
        raise PredictorError(f"{json_file}: no model {', '.join(absent)} in it, whose times could be renewed")
    if "auxiliary" in models and (why := auxiliary.missing()):
        raise PredictorError(f"{json_file} has the auxiliary baseline: {why}")
    times = {"ours": timing.of_checkpoint(checkpoints.load(checkpoint))}
    if paper is not None:
        times["paper"] = timing.of_checkpoint(checkpoints.load(paper))
    if "auxiliary" in models:
        times["auxiliary"] = times["auxiliary-l1"] = timing.of_encoder(auxiliary.Encoder())
    for name in times.keys() & models.keys():
        models[name]["microseconds_per_step"] = times[name]
    _write_json(json_file, result)
    for name, micros in times.items():
        Console().print(f"{name}: {' / '.join(f'{value:,.0f}' for value in micros.values())} us")


def show(result: dict[str, Any]) -> None:
    """Print the result of an evaluation as a table."""
    columns = ("MAE", "95 %", "relative", "tau", "CRPS", "P50", "P90", "parameters")
    title = f"test set: {result['test']['pairs']} pairs of {result['test']['prompts']} prompts"
    table = tables.table("name", *columns, title=title)
    for model in result["models"]:
        low, high = model["mae_interval"]
        shares = (f"{model[name]:.2f}" for name in ("relative_mae", "kendall_tau"))
        coverage = (f"{model[name]:.1%}" for name in ("p50_coverage", "p90_coverage"))
        mae, crps, count = f"{model['mae']:.1f}", f"{model['crps']:.1f}", f"{model['parameters']:,}"
        table.add_row(model["name"], mae, f"{low:.0f}-{high:.0f}", *shares, crps, *coverage, count)
    tables.show(table)
    for one in result["skipped"]:
        tables.show(f"not compared: {one['baseline']}: {one['reason']}")
    for where, name in (("a prefill elsewhere", "behind_a_prefill"), ("a move", "behind_a_move")):
        behind = result.get(name, {})  # an evaluation of before has none
        for kind, what in (("carried", "the average of the states travels"), ("restarted", "it is lost")):
            one = behind.get(kind)
            if one and one["mae_above_share"] is not None:
                low, high = one["mae_above_share_interval"]
                change = f"{one['mae_above_share']:+.1%} ({low:+.1%} to {high:+.1%})"
                tables.show(f"behind {where}, {what}: MAE {one['mae']:.1f}, {change} against one instance")
    if "noise_floor" in result:
        least = result["noise_floor"]
        tables.show(f"least possible on {least['prefixes']} prefixes: MAE {least['mae']}, CRPS {least['crps']}")
        for name, share in result["reducible_error_removed"].items():
            tables.show(f"  reducible MAE of {name} removed: {share['mae']} {share['mae_interval']}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise PredictorError(f"{path}: cannot be written: {error}") from error


for command in (learner.learn, learner.history, learner.rollback, learner.freeze):
    app.command()(command)
