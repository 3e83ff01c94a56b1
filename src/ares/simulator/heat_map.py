"""KV use of each decode instance over time as an SVG, with every migration as an arrow."""

import base64
import html
import io

import numpy as np
from matplotlib import colormaps, image
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ares.simulator.cluster import Outcome

_WIDTH, _HEIGHT, _ROW_MAX, _LEFT, _BELOW = 520, 400, 40, 76, 34
_LABEL = 13  # pixels that a name needs
_COLOURS = "inferno"
_TEXT = "font-family='system-ui,sans-serif' font-size='11' fill='#444'"


_TIP = (
    "<defs><marker id='tip' viewBox='0 0 6 6' refX='5' refY='3' markerWidth='5' markerHeight='5' orient='auto'>"
    "<path d='M0,0L6,3L0,6z' fill='#4df'/></marker></defs>"
)


def _picture(shares: NDArray[np.float64]) -> str:
    """Return a picture of shares, shape (rows, columns), as a data URL."""
    buffer = io.BytesIO()
    image.imsave(buffer, colormaps[_COLOURS](np.clip(shares, 0.0, 1.0)), format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def colour_scale() -> str:
    """Return the scale of the colours of all maps."""
    ticks = "".join(
        f"<text x='{30 + 2 * part}' y='32' text-anchor='middle' {_TEXT}>{part} %</text>" for part in (0, 50, 100)
    )
    url = _picture(np.linspace(0.0, 1.0, 200)[None, :])
    return (
        f"<figure><svg viewBox='0 0 260 36' width='260' height='36' role='img' aria-label='colour scale'>"
        f"<image href='{url}' x='30' y='4' width='200' height='14' preserveAspectRatio='none'/>{ticks}</svg>"
        "<figcaption>share of an instance's KV in use</figcaption></figure>"
    )


def migrations(count: int) -> str:
    """Return how many migrations there are, in words."""
    return f"{count:,} migrations" if count > 1 else ("no migrations", "1 migration")[count]


def heat_map(outcome: Outcome) -> str:
    """Draw the KV use of a run."""
    use = outcome.kv_use.T
    instances = use.shape[0]
    row = min(_ROW_MAX, max(2, _HEIGHT // instances))
    height = instances * row
    end = max(float(outcome.sample_s[-1]), 1e-9)
    # Samples are evenly spaced in time; where there are more than pixels, those of a pixel are averaged.
    columns = np.array_split(np.arange(use.shape[1]), min(_WIDTH, use.shape[1]))
    small = np.stack([use[:, part].mean(axis=1) for part in columns], axis=1)
    name = html.escape(outcome.preset)
    moves = f"; {migrations(len(outcome.moves))}{' (arrows)' if outcome.moves else ''}"
    return (
        f"<figure><svg viewBox='0 0 {_LEFT + _WIDTH + 16} {height + _BELOW}' width='{_LEFT + _WIDTH + 16}' "
        f"height='{height + _BELOW}' role='img' aria-label='KV use under {name}'>{_TIP}"
        f"<image href='{_picture(small)}' x='{_LEFT}' width='{_WIDTH}' height='{height}' "
        f"preserveAspectRatio='none' style='image-rendering:pixelated'/>{_names(instances, row)}{_times(end, height)}"
        f"<g stroke='#4df' stroke-width='1'>{_arrows(outcome, end, row)}</g></svg>"
        f"<figcaption><b>{name}</b>: {instances} decode instances over {end:,.0f} s{moves}</figcaption></figure>"
    )


def _names(instances: int, row: int) -> str:
    """Return the names of the instances, of as many as there is room for."""
    return "".join(
        f"<text x='{_LEFT - 6}' y='{(number + 0.5) * row + 4:.1f}' text-anchor='end' {_TEXT}>decode-{number}</text>"
        for number in range(0, instances, -(-_LABEL // row))
    )


def _times(end: float, height: int) -> str:
    """Return the time axis, seconds since the first arrival."""
    ticks = [tick for tick in MaxNLocator(6).tick_values(0.0, end) if 0 <= tick <= end]
    places = [(tick, f"{_LEFT + tick / end * _WIDTH:.1f}") for tick in ticks]
    parts = [
        f"<line x1='{x}' x2='{x}' y1='{height}' y2='{height + 4}' stroke='#444'/>"
        f"<text x='{x}' y='{height + 16}' text-anchor='middle' {_TEXT}>{tick:,g}</text>"
        for tick, x in places
    ]
    middle = _LEFT + _WIDTH / 2
    return f"{''.join(parts)}<text x='{middle:.0f}' y='{height + 30}' text-anchor='middle' {_TEXT}>time, s</text>"


def _arrows(outcome: Outcome, end: float, row: int) -> str:
    lines = []
    for move in outcome.moves:
        x = _LEFT + move.time_s / end * _WIDTH
        y1, y2 = (move.source + 0.5) * row, (move.target + 0.5) * row
        way = f"decode-{move.source} to decode-{move.target}"
        label = html.escape(f"{move.time_s:.1f} s: request {move.request}, {way}; {move.reason}")
        lines.append(
            f"<line class='move' x1='{x:.1f}' y1='{y1:.1f}' x2='{x:.1f}' y2='{y2:.1f}' marker-end='url(#tip)'>"
            f"<title>{label}</title></line>"
        )
    return "".join(lines)
