"""The table of docs/metrics.md: every Prometheus metric of a gateway, from the metrics themselves."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from prometheus_client import Metric

from ares.gateway.records.metrics import Metrics

BEGIN, END = "<!-- metrics -->", "<!-- end -->"


def exported() -> list[Metric]:
    """Return every metric of a gateway, with a sample of each of its series."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        for count in range(1, 8):  # a metric takes exactly as many values as it has labels
            with contextlib.suppress(AttributeError, ValueError):
                metric.labels(*["x"] * count)
    return list(metrics.registry.collect())


def table() -> str:
    """Return the table, in order of the metrics' names."""
    rows = []
    for metric in sorted(exported(), key=lambda metric: metric.name):
        name = metric.name + ("_total" if metric.type == "counter" else "")
        labels = ", ".join(f"`{label}`" for label in metric.samples[0].labels if label != "le") or "-"
        said = metric.documentation.replace("|", "\\|")
        rows.append(f"| `{name}` ({metric.type}) | {labels} | {said} |")
    return "\n".join(["| metric | labels | what it is |", "|---|---|---|", *rows])


def filled(page: str) -> str:
    """Return the page with its table updated; ValueError where it has no place for it."""
    if BEGIN not in page:
        raise ValueError(f"docs/metrics.md has no place {BEGIN}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def command(page: Annotated[Path, typer.Argument(help="The page to fill.")] = Path("docs/metrics.md")) -> None:
    """Update the table of docs/metrics.md, from the gateway's metrics."""
    page.write_text(filled(page.read_text()))
