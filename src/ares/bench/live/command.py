"""`ares bench live`: static placement and ARES over the same running engines, in turns."""

import asyncio
import itertools
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn, TimeElapsedColumn

from ares import extras
from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.live import client, load, multi_turn, saved, summary
from ares.bench.live.conversations import Conversation, conversations, said_in
from ares.bench.options import JsonFile, Model, Port, Simulate
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.objectives import DEFAULT_GAP_S, SloGap, json_gap
from ares.terminal import tables
from ares.terminal.errors import exit_with_error
from ares.terminal.progress import progress_display

_WARM_PROMPT, _WARM_OUTPUT = 64, 32
# Longest output of real engines, tokens.
_LIMIT = 1024
PRESETS = "static-rr,static-least-loaded,ares-no-prediction,ares"


async def _warm_up(url: str, model: str, decode: int) -> list[int]:
    """Send every engine some requests, since the first ones take longer; return the lengths of the outputs."""
    generator = random.Random(5)  # noqa: S311 - a workload, not a secret

    async def complete(http: aiohttp.ClientSession) -> int:
        prompt = load.random_prompt(generator, _WARM_PROMPT)
        body = {"model": model, "prompt": prompt, "max_tokens": _WARM_OUTPUT, "ignore_eos": True, "temperature": 0}
        async with http.post(f"{url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise sse.StreamError(f"{reply.status}: {(await reply.text())[:200]}")
            return int((await reply.json())["usage"]["completion_tokens"])

    async with aiohttp.ClientSession() as http:
        return list(await asyncio.gather(*(complete(http) for _ in range(2 * decode))))


def _preset_names(presets: str) -> list[str]:
    """Return the names of --presets; an error where the gateway could not switch between them."""
    from ares import policy
    from ares.config import live_preset

    names = presets.split(",")
    try:
        for name in names:
            live_preset(name)
    except ValueError as error:
        exit_with_error(str(error))
    if files := [name for name in names[1:] if name not in policy.PRESETS]:
        exit_with_error(
            f"--presets: a gateway takes a file at its start alone: name {files[0]} first, and no other file"
        )
    return names


async def _measure(
    url: str, model: str, presets: list[str], rounds: list[list[load.Planned]], console: Console
) -> tuple[list[list[client.Run]], list[dict[str, Any]], list[int]]:
    async with aiohttp.ClientSession() as http:
        instances = (await client.gateway_status(http, url))["instances"]
    warm = await _warm_up(url, model, sum(row["role"] != "prefill" for row in instances))
    every: list[list[client.Run]] = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with progress_display(console, *columns) as progress:
        for number, planned in enumerate(rounds):
            runs = []
            for name in load.order(presets, number):
                task = progress.add_task(f"round {number + 1}, {name}", total=len(planned))
                # The same prompts for all, and cached for none.
                own = load.salted(planned, f"{number}-{name}")
                runs.append(await client.run_preset(url, model, name, own, partial(progress.advance, task)))
            every.append(runs)
    return every, instances, warm


def command(
    presets: Annotated[
        str,
        typer.Option(help="Presets to compare, separated by commas; the others are compared with the static ones."),
    ] = (PRESETS),
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompt files (JSONL or text) for real engines; for multi-turn, what users say in their conversations."
        ),
    ] = None,
    simulate: Simulate = None,
    workload: Annotated[
        str,
        typer.Option(help="With --simulate: a synthetic workload or a trace file. And on any engines: multi-turn."),
    ] = "chat",
    load_factor: Annotated[
        float, typer.Option("--load", help="With --simulate: load as a multiple of capacity.")
    ] = 1.0,
    requests: Annotated[int, typer.Option(min=2, help="Requests of a run; with multi-turn, conversations.")] = 60,
    rate: Annotated[
        float,
        typer.Option(
            min=0.001, help="Requests a second on real engines; with multi-turn, conversations a second on any."
        ),
    ] = 0.4,
    limit: Annotated[int, typer.Option(min=2, help="Longest output, on real engines.")] = _LIMIT,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each preset.")] = 3,
    prefill: Annotated[int, typer.Option(min=0, help="Prefill instances.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode instances.")] = 2,
    max_model_len: Annotated[
        int,
        typer.Option(
            min=64, help="Longest sequence of the real engines: vLLM requires KV memory for one such sequence."
        ),
    ] = 2048,
    kv_bytes: Annotated[str, typer.Option(help="KV memory of each instance, on real engines.")] = "100M",
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a KV block of the real engines; by default what vLLM chooses.")
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(help="With --simulate: KV capacity instead of the profile's.")
    ] = None,
    slo_ttft: Annotated[float, typer.Option(min=0, help="TTFT objective, seconds.")] = 10.0,
    slo_tpot: Annotated[float, typer.Option(min=0, help="TPOT objective, seconds.")] = 0.1,
    slo_gap: SloGap = DEFAULT_GAP_S,
    seed: Annotated[int, typer.Option(help="Seed of the arrivals and of the order of prompts.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Data type of the real engines: with float32 no token depends on the rest of the batch.")
    ] = "auto",
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    predictor: Annotated[
        str | None,
        typer.Option(
            help="Error model of the simulated runs, as for `ares bench fidelity`; the engines keep their predictor."
        ),
    ] = None,
    json_file: JsonFile = None,
    runs_file: Annotated[
        Path | None, typer.Option("--runs", help="Write the runs here, for `ares bench fidelity`.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for the pictures.")] = None,
) -> None:
    """Compare presets on real engines: the same prompts and arrivals, in turns, and simulated against measured figures.

    Outputs are greedy: with --dtype float32 every preset must produce the same tokens, and the result lists the
    requests for which it did not; in bfloat16 near ties depend on the batch.
    """
    extras.require("numba", *(["matplotlib"] if report is not None else []))
    names = _preset_names(presets)
    caching = ["--enable-prefix-caching"] if workload == multi_turn.NAME else []
    mock_flags = [*caching, *(["--kv-tokens", str(kv_tokens)] if kv_tokens is not None else [])]
    engine_flags = ["--kv-cache-memory-bytes", kv_bytes, "--max-model-len", str(max_model_len), "--dtype", dtype]
    engine_flags += ["--block-size", str(block_size)] if block_size is not None else []
    gap = "none" if json_gap(slo_gap) is None else str(slo_gap)
    settings = local.ClusterSettings(
        model=model,
        prefill=prefill,
        decode=decode,
        preset=names[0],
        port=port,
        simulate=simulate,
        vllm_flags=tuple(local_flags(engine_flags) if simulate is None else mock_flags),
        gateway_flags=("--slo-ttft-s", str(slo_ttft), "--slo-tpot-s", str(slo_tpot), "--slo-gap-s", gap),
    )
    if workload == multi_turn.NAME:
        given: dict[str, object] = {"--runs": runs_file, "--report": report, "--predictor": predictor}
        given |= {"--load": load_factor != 1.0, "--limit": limit != _LIMIT}
        if without := [flag for flag, value in given.items() if value]:
            exit_with_error(f"{without[0]} has no effect with --workload {workload}: leave it out")
        longest = multi_turn.LONGEST if simulate else max_model_len
        chats = _conversations(prompts, model, requests, rate, longest, range(seed, seed + rounds))
        described = {"model": model, "engines": f"mock: {simulate}" if simulate else "vLLM", "rate": rate}
        described |= {
            "prompts": [file.name for file in prompts or []],
            "seed": seed,
            "kv_tokens": kv_tokens,
            "dtype": dtype,
        }
        multi_turn.run(settings, names, chats, described, json_file)
        return
    if simulate is None and not prompts:
        exit_with_error("give --prompts FILE for real engines, or --simulate PROFILE")
    loads: list[list[load.Planned]] = []  # another one for each round
    for each in range(seed, seed + rounds):
        if simulate is not None:
            try:
                size = (prefill, decode)
                one_load = _simulated_load(simulate, workload, load_factor, requests, size, kv_tokens, each)
            except ValueError as error:
                exit_with_error(str(error))
        else:
            one_load = load.from_prompts(prompts or [], requests, rate, limit, each, _note if each == seed else _ignore)
        loads.append(load.renamed(one_load, f"{each - seed + 1}-"))
    console = Console(stderr=True)
    with local.running(settings, console) as cluster:
        every, instances, warm = asyncio.run(_measure(cluster.url, model, names, loads, console))
    from ares.bench.live import fidelity, fidelity_command  # importing the simulator takes a while

    runs, slo = [run for one in every for run in one], summary.Objectives(slo_ttft, slo_tpot, slo_gap)
    figures = [{run.preset: summary.summarize(run, slo) for run in one} for one in every]
    bases = [name for name in names if name.startswith("static") or name == "off"] or names[:1]
    result = {
        "benchmark": "live",
        "model": model,
        "engines": f"mock: {simulate}" if simulate else "vLLM",
        "dtype": dtype,
        "prefill": prefill,
        "decode": decode,
        "kv_tokens": [row.get("capacity_tokens") for row in instances if row["role"] != "prefill"],
        "requests": requests,
        "rate": statistics.fmean((len(one) - 1) / (one[-1].at_s - one[0].at_s) for one in loads),
        "slo": {"ttft_s": slo_ttft, "tpot_s": slo_tpot, "gap_s": json_gap(slo_gap)},
        **describe(),
        "rounds": [{"runs": list(one.values())} for one in figures],
        "ratios": [summary.ratios(figures, name, base) for name in names if name not in bases for base in bases],
        "requests_with_differing_tokens": summary.differing(runs),
    }
    kept = saved.in_order(runs, warm, limit if simulate is None else None)
    if runs_file is not None:
        about = {key: result[key] for key in ("model", "engines", "dtype", "versions", "commit", "machine", "rate")}
        saved.write_runs(saved.SavedRuns(saved.FORMAT, about, kept), runs_file)
    try:
        result["simulator"] = fidelity.compare(kept, predictor)
    except ValueError as error:
        result["simulator"] = {"refused": str(error)}
    show(names, figures, result)
    fidelity_command.show(result["simulator"])
    if report is not None:
        from ares.bench.live import plots

        report.mkdir(parents=True, exist_ok=True)
        plots.draw(runs, report / f"{json_file.stem if json_file else 'live'}.svg")
    write(result, json_file)


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def _ignore(_text: str) -> None:
    """Show no note: the first round has shown it."""


def _conversations(
    files: list[Path] | None, model: str, count: int, rate: float, longest: int, seeds: range
) -> list[list[Conversation]]:
    """Return the conversations of each round."""
    notes = itertools.chain([_note], itertools.repeat(_ignore))
    said = [said_in(files, model, seed, note) if files else () for seed, note in zip(seeds, notes, strict=False)]
    return [conversations(count, rate, longest, seed, texts) for seed, texts in zip(seeds, said, strict=True)]


def _simulated_load(
    profile: str,
    workload: str,
    factor: float,
    requests: int,
    instances: tuple[int, int],
    kv_tokens: int | None,
    seed: int,
) -> list[load.Planned]:
    from ares.simulator.metrics import capacity_rps
    from ares.simulator.profile import load_profile
    from ares.traces import WORKLOADS, read_trace, synthetic

    work = synthetic(workload, requests, seed) if workload in WORKLOADS else read_trace(Path(workload), None)
    for note in work.notes:
        _note(note)
    work = work.repeated(requests)
    engine = load_profile(profile)
    if kv_tokens is not None:
        engine = engine.model_copy(update={"kv_tokens": kv_tokens})
    prefill, decode = instances
    return load.from_workload(work.at_rate(factor * capacity_rps(work, [engine] * decode, [engine] * prefill)), seed)


def show(names: list[str], figures: list[dict[str, dict[str, Any]]], result: dict[str, Any]) -> None:
    """Print the results as tables."""
    times = ("TPOT\np50 ms", "TPOT\np99 ms", "TTFT\np50 s", "TTFT\np99 s", "longest gap\np99 s")
    columns = (*times, "goodput\n/s", "preempt", "moves")
    table = tables.table("preset", *columns, title=f"medians over {len(figures)} rounds")

    def median(name: str, *path: str) -> float:
        values = sorted(float(_at(one[name], path)) for one in figures)
        return values[len(values) // 2]

    for name in names:
        table.add_row(
            name,
            f"{1e3 * median(name, 'tpot_s', 'p50'):.1f}",
            f"{1e3 * median(name, 'tpot_s', 'p99'):.1f}",
            f"{median(name, 'ttft_s', 'p50'):.2f}",
            f"{median(name, 'ttft_s', 'p99'):.2f}",
            f"{median(name, 'longest_gap_s', 'p99'):.2f}",
            f"{median(name, 'goodput_rps'):.3f}",
            f"{median(name, 'preemptions'):.0f}",
            f"{median(name, 'migrations'):.0f}",
        )
    tables.show(table)
    wrong = result["requests_with_differing_tokens"]
    asked = result["requests"] * len(figures)
    tables.show(f"requests whose tokens differ between presets: {len(wrong)} of {asked}")


def _at(one: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        one = one[name]
    return one
