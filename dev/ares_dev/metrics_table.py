"""The tables of docs/metrics.md: every Prometheus metric of ours, from the calls that make them."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import ares

BEGIN, END = "<!-- metrics -->", "<!-- end -->"
_KINDS = ("Counter", "Gauge", "Histogram", "Info", "Summary")


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as its call has it; `buckets` are the upper bounds of a histogram."""

    name: str
    kind: str
    said: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...]


def metrics(root: Path | None = None) -> list[Metric]:
    """Return the metrics that the modules of a folder make, by default those of ARES, in order of their names."""
    folder = root or Path(ares.__file__).parent
    found = [metric for file in sorted(folder.rglob("*.py")) for metric in _of(ast.parse(file.read_text()))]
    return sorted(found, key=lambda metric: metric.name)


def _of(module: ast.Module) -> Iterator[Metric]:
    constants = {
        target.id: node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(module):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _KINDS):
            continue
        texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if len(texts) < 2:
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        labels = given.get("labelnames", node.args[2] if len(node.args) > 2 else None)
        buckets = given.get("buckets")
        if isinstance(buckets, ast.Name):
            buckets = constants[buckets.id]
        yield Metric(
            texts[0],
            node.func.id.lower(),
            texts[1],
            tuple(ast.literal_eval(labels)) if labels is not None else (),
            tuple(ast.literal_eval(buckets)) if buckets is not None else (),
        )


def table() -> str:
    """Return the table."""
    rows = []
    for metric in metrics():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        said = metric.said.replace("|", "\\|")
        if metric.buckets:
            said += f" ({len(metric.buckets)} buckets, {metric.buckets[0]:g} to {metric.buckets[-1]:g})"
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {said} |")
    return "\n".join(["| metric | type | labels | what it is |", "|---|---|---|---|", *rows])


def filled(page: str) -> str:
    """Return the page with its table updated; ValueError where it has no place for it."""
    if BEGIN not in page:
        raise ValueError(f"docs/metrics.md has no place {BEGIN}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def command(page: Annotated[Path, typer.Argument(help="The page to fill.")] = Path("docs/metrics.md")) -> None:
    """Update the table of docs/metrics.md, from the metrics' definitions."""
    page.write_text(filled(page.read_text()))
