"""A self-contained HTML page: results, distributions, waiting, KV use over time with every migration as an arrow."""

import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ares.simulator.cluster import Outcome
from ares.simulator.heat_map import colour_scale, heat_map, migrations
from ares.simulator.metrics import longest_gap_s, tpot_s, ttft_s
from ares.simulator.plots import COLOURS, figure
from ares.text_files import TextFileError, read_text

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}
td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th{white-space:normal;vertical-align:bottom}td:first-child,th:first-child{text-align:left}
td.text{text-align:left;white-space:normal;min-width:20em}
.wide{overflow-x:auto}.parts{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0;max-width:100%}
figure svg{max-width:100%;height:auto;display:block}figcaption,.note{font-size:13px;color:#555}
line.move:hover{stroke:#fff;stroke-width:3}details{margin:.6em 0}details table{font-size:12px}
code{background:#f4f4f4;padding:0 .25em;overflow-wrap:anywhere}li{overflow-wrap:anywhere}
pre{background:#f4f4f4;padding:.6em;white-space:pre-wrap;overflow-wrap:anywhere}"""
_LISTED = 500
_POINTS = 300  # of a line over time
_SHORTEST_S = 1e-3  # shorter times are drawn as this, on a logarithmic axis
_LOAD = (
    "Load is the arrival rate as a multiple of the cluster's capacity: at load 1 requests arrive as fast as they leave "
    "when every instance has its KV memory, or its slots, full all the time. No policy holds out above 1 for long, and "
    "below it the unevenness of lengths and instances is what costs."
)
_NO_CURVES = (
    "<p class='note'>Load curves need several loads: run <code>ares simulate sweep --json sweep.json</code>, and give "
    "<code>--curves sweep.json</code>.</p>"
)


def duration(seconds: float) -> str:
    """Return a time as a person reads it, with three digits; an en dash where there is none."""
    if seconds != seconds:  # noqa: PLR0124 - not a number
        return "\N{EN DASH}"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def _table(runs: list[dict[str, Any]]) -> str:
    head = "preset|load|TTFT p50|TTFT p99|TPOT p50|TPOT p99|longest gap p99|goodput, requests/s"
    head += "|SLOs met|preemptions|migrations"
    cells = [f"<tr>{''.join(f'<th>{name}</th>' for name in head.split('|'))}</tr>"]
    for run in runs:
        values = (
            html.escape(str(run["preset"])),
            f"{run['load']:.2f}",
            *(duration(run[measure][point]) for measure in ("ttft_s", "tpot_s") for point in ("p50", "p99")),
            duration(run["longest_gap_s"]["p99"]),
            f"{run['goodput_rps']:.3g}",
            f"{run['slo_share']:.1%}",
            f"{run['preemptions']:,.0f}",
            f"{run['migrations']:,.0f}",
        )
        cells.append(f"<tr>{''.join(f'<td>{value}</td>' for value in values)}</tr>")
    return f"<div class='wide'><table>{''.join(cells)}</table></div>"


def _moves(outcome: Outcome) -> str:
    if not outcome.moves:
        return ""
    rows = "".join(
        f"<tr><td>{move.time_s:.1f}</td><td>{move.request}</td><td>decode-{move.source} to decode-{move.target}</td>"
        f"<td class='text'>{html.escape(move.reason)}</td></tr>"
        for move in outcome.moves[:_LISTED]
    )
    rest = len(outcome.moves) - _LISTED
    more = f"<p>and {rest:,} more, all drawn above</p>" if rest > 0 else ""
    return (
        f"<details><summary>{html.escape(outcome.preset)}: {migrations(len(outcome.moves))}</summary>"
        "<div class='wide'><table><tr><th>s</th><th>request</th><th>from, to</th><th>reason</th></tr>"
        f"{rows}</table></div>{more}</details>"
    )


def _svg(drawn: Figure) -> str:
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _panel(outcomes: list[Outcome], title: str, across: str, draw: Any, objective: float | None = None) -> str:
    """Draw one line for each run; `draw` returns its two axes."""
    drawn = Figure(figsize=(4.1, 3.0), layout="constrained")
    axes = drawn.subplots()
    for number, outcome in enumerate(outcomes):
        axes.plot(*draw(outcome), label=outcome.preset, color=COLOURS[number % len(COLOURS)], linewidth=1.2)
    if objective is not None:
        axes.axvline(objective, color="red", linewidth=0.8, linestyle=":", label="objective")
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 500 * low else (1.0,)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    return f"<figure>{_svg(drawn)}</figure>"


def _distributions(outcomes: list[Outcome], slo: dict[str, Any]) -> str:
    """Draw which share of the requests had at most what."""

    def share(measure: Any, factor: float) -> Any:
        def draw(outcome: Outcome) -> Any:
            values = np.maximum(np.sort(measure(outcome)), _SHORTEST_S) * factor
            return values, np.arange(1, len(values) + 1) / len(values)

        return draw

    gap = slo.get("gap_s")
    return "".join(
        (
            _panel(outcomes, "share of requests by TTFT", "s", share(ttft_s, 1.0), slo["ttft_s"]),
            _panel(outcomes, "share of requests by TPOT", "ms", share(tpot_s, 1e3), slo["tpot_s"] * 1e3),
            _panel(
                outcomes, "share of requests by their longest gap", "s", share(longest_gap_s, 1.0),
                gap if isinstance(gap, int | float) else None,
            ),
        )
    )  # fmt: skip


def _waiting(outcome: Outcome) -> tuple[list[float], list[float]]:
    """Return times, and how many requests waited about then."""
    parts = np.array_split(np.arange(len(outcome.sample_s)), min(_POINTS, len(outcome.sample_s)))
    return [float(outcome.sample_s[part].mean()) for part in parts], [
        float(outcome.queued[part].mean()) for part in parts
    ]


def _curves(result: dict[str, Any], swept: dict[str, Any] | None) -> str:
    """Draw the load curves, where there are several loads."""
    points, slo = (swept["points"], swept["slo"]) if swept else (result["runs"], result["slo"])
    if len({point["load"] for point in points}) < 2:
        return _NO_CURVES
    return f"<div class='wide'><figure>{_svg(figure(points, slo))}</figure></div>"


def read_sweep(path: Path) -> dict[str, Any]:
    """Read a result of `ares simulate sweep`; ValueError where its curves could not be drawn."""
    try:
        swept: dict[str, Any] = json.loads(read_text(path))
        figure(swept["points"], swept["slo"])
    except TextFileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not what ares simulate sweep writes: {error!r}") from None
    return swept


def write_report(
    directory: Path,
    result: dict[str, Any],
    outcomes: list[Outcome],
    swept: dict[str, Any] | None = None,
    command: str | None = None,
) -> Path:
    """Write index.html into a directory and return its path.

    Parameters
    ----------
    directory
        Created where it does not exist.
    result
        What `--json` writes.
    outcomes
        The runs themselves, for the distributions, the waiting and the maps.
    swept
        What `read_sweep` returns, for the load curves; without it there are none where the runs have one load.
    command
        The command that made it.
    """
    facts = "".join(
        f"<li>{html.escape(str(key))}: <code>{html.escape(str(value))}</code></li>"
        for key, value in (result["scenario"] | result["provenance"]).items()
    )
    slo = result["slo"]
    objectives = f"TTFT within {duration(slo['ttft_s'])}, TPOT within {duration(slo['tpot_s'])}"
    waiting = _panel(outcomes, "requests that wait for admission", "s", _waiting)
    made = f"<pre>{html.escape(command)}</pre>" if command else ""
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>ARES simulation</title>"
        f"<style>{_STYLE}</style><h1>Simulation</h1><p>Goodput counts requests with {objectives}, and a longest gap "
        f"within its objective; TTFT includes every wait. {_LOAD}</p>"
        f"{_table(result['runs'])}<h2>Distributions</h2><div class='parts'>{_distributions(outcomes, slo)}</div>"
        f"<h2>Waiting</h2>{waiting}<h2>Load curves</h2>{_curves(result, swept)}"
        f"<h2>KV use over time</h2>{colour_scale()}<div class='parts'>{''.join(map(heat_map, outcomes))}</div>"
        f"<h2>Migrations</h2>{''.join(map(_moves, outcomes)) or '<p>none</p>'}"
        f"<h2>How it was made</h2>{made}<ul>{facts}</ul></html>\n"
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
