"""A self-contained HTML page: results, load curves, and KV use over time with every migration as an arrow."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, image

from ares.simulator.cluster import Outcome
from ares.simulator.plots import figure
from ares.text_files import TextFileError, read_text

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.maps{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0}
figcaption{font-size:13px;color:#555}line.move:hover{stroke:#fff;stroke-width:3}details{margin:.6em 0}
details table{font-size:12px}code{background:#f4f4f4;padding:0 .25em}"""

_WIDTH, _ROW_MAX, _LISTED = 600, 40, 500


def _table(runs: list[dict[str, Any]]) -> str:
    head = "preset|load|TTFT p50, s|TTFT p99, s|TPOT p50, ms|TPOT p99, ms|longest gap p99, s|goodput, /s"
    head += "|objectives met|preemptions|migrations"
    cells = [f"<tr>{''.join(f'<th>{name}</th>' for name in head.split('|'))}</tr>"]
    for run in runs:
        values = (
            html.escape(str(run["preset"])),
            f"{run['load']:.2f}",
            f"{run['ttft_s']['p50']:.3g}",
            f"{run['ttft_s']['p99']:.4g}",
            f"{run['tpot_s']['p50'] * 1e3:.1f}",
            f"{run['tpot_s']['p99'] * 1e3:.1f}",
            f"{run['longest_gap_s']['p99']:.3g}",
            f"{run['goodput_rps']:.4g}",
            f"{run['slo_share']:.1%}",
            f"{run['preemptions']:.0f}",
            f"{run['migrations']:.0f}",
        )
        cells.append(f"<tr>{''.join(f'<td>{value}</td>' for value in values)}</tr>")
    return f"<table>{''.join(cells)}</table>"


def _heat_map(outcome: Outcome) -> str:
    """Draw KV use per instance over time as an SVG with its migrations."""
    use = outcome.kv_use.T
    instances = use.shape[0]
    row = min(_ROW_MAX, max(2, 400 // instances))
    height = instances * row
    end = max(float(outcome.sample_s[-1]), 1e-9)
    # Samples are evenly spaced in time; where there are more than pixels, those of a pixel are averaged.
    columns = np.array_split(np.arange(use.shape[1]), min(_WIDTH, use.shape[1]))
    small = np.stack([use[:, part].mean(axis=1) for part in columns], axis=1)
    buffer = io.BytesIO()
    image.imsave(buffer, colormaps["inferno"](np.clip(small, 0.0, 1.0)), format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    arrows = []
    for move in outcome.moves:
        x = move.time_s / end * _WIDTH
        y1, y2 = (move.source + 0.5) * row, (move.target + 0.5) * row
        label = html.escape(
            f"{move.time_s:.1f} s: request {move.request}, {move.source} to {move.target}; {move.reason}"
        )
        arrows.append(
            f'<line class="move" x1="{x:.1f}" y1="{y1:.1f}" x2="{x:.1f}" y2="{y2:.1f}" marker-end="url(#tip)">'
            f"<title>{label}</title></line>"
        )
    name = html.escape(outcome.preset)
    caption = f"<b>{name}</b>: share of KV in use, {instances} decode instances over {end:.0f} s"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="{name}"><defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="5" '
        f'markerHeight="5" orient="auto"><path d="M0,0L6,3L0,6z" fill="#4df"/></marker></defs>'
        f'<image href="data:image/png;base64,{data}" width="{_WIDTH}" height="{height}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated"/>'
        f'<g stroke="#4df" stroke-width="1">{"".join(arrows)}</g></svg>'
        f"<figcaption>{caption}; {len(outcome.moves)} migrations (arrows)</figcaption></figure>"
    )


def _moves(outcome: Outcome) -> str:
    if not outcome.moves:
        return ""
    rows = "".join(
        f"<tr><td>{move.time_s:.1f}</td><td>{move.request}</td><td>{move.source} to {move.target}</td>"
        f"<td style='text-align:left'>{html.escape(move.reason)}</td></tr>"
        for move in outcome.moves[:_LISTED]
    )
    rest = len(outcome.moves) - _LISTED
    more = f"<p>and {rest} more, all drawn above</p>" if rest > 0 else ""
    return (
        f"<details><summary>{html.escape(outcome.preset)}: {len(outcome.moves)} migrations</summary>"
        f"<table><tr><th>s</th><th>request</th><th>from, to</th><th>reason</th></tr>{rows}</table>{more}</details>"
    )


def _curves(points: list[dict[str, Any]], slo: dict[str, float]) -> str:
    buffer = io.StringIO()
    figure(points, slo).savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


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
    directory: Path, result: dict[str, Any], outcomes: list[Outcome], swept: dict[str, Any] | None = None
) -> Path:
    """Write index.html into a directory and return its path.

    Parameters
    ----------
    directory
        Created where it does not exist.
    result
        What `--json` writes.
    outcomes
        The runs themselves, for the maps.
    swept
        What `read_sweep` returns, for the load curves; without it the curves have the runs' single load.
    """
    points, slo = (swept["points"], swept["slo"]) if swept else (result["runs"], result["slo"])
    facts = "".join(
        f"<li>{html.escape(str(key))}: <code>{html.escape(str(value))}</code></li>"
        for key, value in (result["scenario"] | result["provenance"]).items()
    )
    objectives = f"TTFT within {result['slo']['ttft_s']:g} s and TPOT within {result['slo']['tpot_s'] * 1e3:g} ms"
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>ARES simulation</title>"
        f"<style>{_STYLE}</style><h1>Simulation</h1><p>Goodput counts requests with {objectives}; "
        "TTFT includes every wait.</p>"
        f"{_table(result['runs'])}<h2>Load curves</h2>{_curves(points, slo)}"
        f"<h2>KV use over time</h2><div class='maps'>{''.join(map(_heat_map, outcomes))}</div>"
        f"<h2>Migrations</h2>{''.join(map(_moves, outcomes)) or '<p>none</p>'}"
        f"<h2>How it was made</h2><ul>{facts}</ul></html>\n"
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
