"""`python -m ares_dev differential`: the table of requests on a cluster of real engines."""

import asyncio
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from ares.bench import sse
from ares.bench.environment import describe, write
from ares.bench.options import JsonFile, Model, Port
from ares.engine.defaults import local_flags
from ares.local_cluster import cluster as local
from ares.models.resolve import DEFAULT_MODEL
from ares.terminal.progress import progress_display
from ares_dev.differential import bodies
from ares_dev.differential.compare import Comparison, compare


async def _run(
    cluster: local.Cluster, reference: str | None, requests: dict[str, bodies.Request], progress: Progress
) -> dict[str, Comparison]:
    instance = reference or next(w.instances["decode-0"] for w in cluster.workers if "decode-0" in w.instances)
    found = {}
    async with sse.session() as http:
        for what in ("unmoved", "moved"):
            task = progress.add_task(what, total=len(requests))
            found[what] = await compare(
                http,
                cluster.url,
                instance,
                cluster.settings.model,
                requests,
                moving=what == "moved",
                done=lambda task=task: progress.advance(task),  # type: ignore[misc]
            )
    return found


def command(
    context: typer.Context,
    section: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(bodies.SECTIONS)}.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="URL of a `vllm serve` with the same model and flags; by default the API of decode-0."),
    ] = None,
    model: Model = DEFAULT_MODEL,
    port: Port = 8010,
    json_file: JsonFile = None,
) -> None:
    """Send each request of a table to the gateway and to a decode instance's own API; status 1 if replies differ.

    Once as they are, and once while every request is moved again and again. Other flags are vLLM's, for every instance;
    those of parsers act on the gateway only, so that requests with tools need --reference.
    """
    for name in section or ():
        if name not in bodies.SECTIONS:
            raise typer.BadParameter(f"{name!r}: expected one of {', '.join(bodies.SECTIONS)}", param_hint="--section")
        if name in bodies.PARSED and reference is None:
            raise typer.BadParameter(f"{name} needs --reference: no instance parses", param_hint="--section")
    requests = bodies.table(section) if section else bodies.table()
    flags = ["--dtype", "float32", "--max-model-len", str(bodies.CONTEXT), *(f for f in context.args if f != "--")]
    settings = local.ClusterSettings(
        model=model, decode=2, preset="off", port=port, vllm_flags=tuple(local_flags(flags))
    )
    console = Console(stderr=True)
    with local.running(settings, console) as cluster, progress_display(console) as progress:
        found = asyncio.run(_run(cluster, reference, requests, progress))
    figures: dict[str, Any] = {name: one.figures() for name, one in found.items()}
    Console().print_json(data=figures)
    write({"benchmark": "differential", "model": model, "flags": flags, **describe(), **figures}, json_file)
    if any(one.different for one in found.values()) or found["unmoved"].stale:
        raise typer.Exit(1)
