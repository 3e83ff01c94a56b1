"""`python -m ares_dev lengths`: how well remaining lengths are estimated by what is known of a request.

Each output is estimated from those that had ended before it began, by the code of the gateway. Of data that
`ares predictor collect` wrote, the outputs come in several random orders; those of a trace in its own.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ares.bench.environment import describe, write
from ares.bench.options import JsonFile
from ares.gateway.control import lengths
from ares.gateway.openai.sampling import Sampling
from ares.gateway.session.length_features import length_features
from ares.policy import length_curves, residual_life
from ares.policy.length_cells import LengthCells, request_keys
from ares.predictor import dataset, metrics
from ares.predictor.hazard import LEVELS
from ares.terminal import tables
from ares.traces.readers import read_trace
from ares.traces.workload import NO_TEMPLATE

_LEVELS = np.array(LEVELS)
_MIDDLE = slice(len(LEVELS) // 2 - 1, len(LEVELS) // 2 + 1)
_LABELS = 8  # of the control, which draws a label for each request
_RESAMPLES = 1000
_UNLIMITED = 1 << 20


@dataclass(frozen=True, slots=True)
class Output:
    """An output and what is known of its request.

    Attributes
    ----------
    limit
        The limit of its tokens; `was_cut`: it reached it.
    templates
        Numbers of its prompt's beginnings, the shortest first.
    label
        Of the set of prompts that it belongs to, or of its trace.
    drawn
        A random label.
    """

    prompt_tokens: int
    tokens: int
    was_cut: bool
    limit: int
    templates: tuple[int, ...]
    label: int
    drawn: int


Keys = Callable[[Output], tuple[int, ...]]

KEYS: dict[str, Keys] = {
    "all": lambda _: (),
    "random label": lambda one: (one.drawn,),
    "prompt length": lambda one: request_keys(one.prompt_tokens),
    "template": lambda one: one.templates,
    "length and template": lambda one: request_keys(one.prompt_tokens, one.templates),
    "true label": lambda one: (one.label,),
    "true label and length": lambda one: request_keys(one.prompt_tokens, (one.label,)),
    "true label, length and template": lambda one: request_keys(one.prompt_tokens, (one.label, *one.templates)),
}
"""What is known of a request, by name; `length and template` is what a gateway uses."""
TODAY = "residual life"


def of_data(labelled: str, seed: int) -> list[Output]:
    """Read a folder that `ares predictor collect` wrote, given as LABEL=FOLDER."""
    label, _, folder = labelled.partition("=")
    if not folder:
        raise typer.BadParameter(f"{labelled}: expected LABEL=FOLDER")
    pairs = dataset.load(Path(folder))
    pairs.require_token_ids("this comparison")
    cut = dict(zip(pairs.output.tolist(), pairs.censored.tolist(), strict=True))
    random = np.random.default_rng(seed)
    sampling = Sampling({}, pairs.source.limit)
    every = enumerate(zip(pairs.prompt_tokens, pairs.output_tokens, strict=True))
    return [
        Output(
            prompt_tokens=len(prompt),
            tokens=len(output),
            was_cut=cut.get(number, False),
            limit=pairs.source.limit,
            # The keys of the prompt's beginnings alone, without those of its length.
            templates=_templates(length_features(prompt.tolist(), sampling).keys),
            label=zlib.crc32(label.encode()),
            drawn=int(random.integers(_LABELS)),
        )
        for number, (prompt, output) in every
    ]


def _templates(keys: tuple[int, ...]) -> tuple[int, ...]:
    by_length = len(request_keys(1))
    return keys[by_length :: by_length + 1]


def of_trace(file: Path, most: int, seed: int) -> list[Output]:
    """Read the first requests of a trace."""
    work = read_trace(file)
    random = np.random.default_rng(seed)
    return [
        Output(
            prompt_tokens=int(work.prompt_tokens[n]),
            tokens=int(work.output_tokens[n]),
            was_cut=False,
            limit=_UNLIMITED,
            templates=tuple(int(one) for one in work.templates[n] if one != NO_TEMPLATE)
            if work.templates is not None
            else (),
            label=0,
            drawn=int(random.integers(_LABELS)),
        )
        for n in range(min(len(work), most))
    ]


@dataclass(slots=True)
class _Errors:
    """Sums over the estimates of each output, shape (R,); `first_`: of those before its first token."""

    count: NDArray[np.float64]
    absolute: NDArray[np.float64]
    crps: NDArray[np.float64]
    first_absolute: NDArray[np.float64]
    first_crps: NDArray[np.float64]


def estimate(
    outputs: list[Output], keys: Keys | None, orders: Iterable[NDArray[np.int64]], every: int, running: int
) -> _Errors:
    """Estimate each output after every so many tokens, from those that had ended; `running` begin before one ends.

    Without `keys`, as residual life does.
    """
    sums = _Errors(*(np.zeros(len(outputs)) for _ in range(5)))
    code = lengths.prepare()
    for order in orders:
        for number, quantiles in _quantiles(outputs, keys, order, every, running, code):
            one = outputs[number]
            position = np.arange(0, one.tokens, every)
            room = (one.limit - position).astype(float)
            bounded = metrics.bounded(np.maximum(quantiles, 1.0), room)
            left = (one.tokens - position).astype(float)
            absolute = np.abs(bounded[:, _MIDDLE].mean(1) - left)
            crps = 2.0 * metrics.pinball(bounded, left)
            sums.count[number] += len(position)
            sums.absolute[number] += absolute.sum()
            sums.crps[number] += crps.sum()
            sums.first_absolute[number] += absolute[0]
            sums.first_crps[number] += crps[0]
    return sums


def _quantiles(
    outputs: list[Output], keys: Keys | None, order: NDArray[np.int64], every: int, running: int, code: lengths.Compiled
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the number of each output, in order, and its quantiles at each position, shape (positions, levels)."""
    cells = LengthCells()
    cells.insert = code.add
    recent, ordered = np.zeros(residual_life.REMEMBERED, np.int64), np.zeros(residual_life.REMEMBERED, np.int64)
    longer = np.empty(len(length_curves.LAST))
    for ended, number in enumerate(order.tolist(), -running):
        one = outputs[number]
        quantiles = np.empty((len(range(0, one.tokens, every)), len(LEVELS)))
        if keys is not None:
            code.compose(cells.lengths, np.array(cells.find(keys(one)), np.int64), longer)
        for row, generated in zip(quantiles, range(0, one.tokens, every), strict=True):
            if keys is None:
                code.expect(ordered, max(ended, 0), generated, LEVELS, row)
            else:
                code.expect_by_curve(longer, generated, LEVELS, row)
        yield number, quantiles
        if ended >= 0:
            last = outputs[order[ended]]
            if keys is None:
                code.remember(recent, ordered, ended, last.tokens)
            else:
                cells.add(keys(last), last.tokens, last.was_cut)


def compare(
    outputs: list[Output], names: list[str], orders: list[NDArray[np.int64]], every: int, running: int
) -> list[dict[str, Any]]:
    """Return the errors by what is known, and their changes from residual life's: 95 % of resamples of the outputs."""
    random = np.random.default_rng(0)
    drawn = random.multinomial(len(outputs), np.full(len(outputs), 1.0 / len(outputs)), _RESAMPLES)
    base: _Errors | None = None
    rows = []
    for name in names:
        found = estimate(outputs, KEYS.get(name), orders, every, running)
        base = base or found
        row: dict[str, Any] = {"known": name}
        for metric in ("absolute", "crps"):
            sums, of_base = getattr(found, metric), getattr(base, metric)
            change = (drawn @ sums) / (drawn @ of_base) - 1.0
            row[metric] = round(float(sums.sum() / found.count.sum()), 2)
            row[f"{metric}_change"] = round(float(sums.sum() / of_base.sum() - 1.0), 4)
            row[f"{metric}_change_interval"] = [round(float(q), 4) for q in np.quantile(change, (0.025, 0.975))]
            row[f"first_{metric}"] = round(float(getattr(found, f"first_{metric}").mean() / len(orders)), 2)
        rows.append(row)
    return rows


def command(
    data: Annotated[
        list[str] | None, typer.Option(help="LABEL=FOLDER of `ares predictor collect`; repeat for each set of prompts.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A trace instead, as of `ares simulate --trace`.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Requests of the trace, from its begin.")] = 6000,
    every: Annotated[int, typer.Option(min=1, help="Tokens between two estimates of an output.")] = 20,
    running: Annotated[int, typer.Option(min=0, help="Requests that begin before an output ends.")] = 16,
    orders: Annotated[int, typer.Option(min=1, help="Random orders of the outputs of --data.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure how well remaining lengths are estimated by what is known of a request, without a model."""
    if (trace is None) == (not data):
        raise typer.BadParameter("give --data or --trace")
    random = np.random.default_rng(seed)
    names = [TODAY, *KEYS]
    if trace is not None:
        outputs = of_trace(trace, most, seed)
        chosen = [np.arange(len(outputs))]
        known = any(one.templates for one in outputs)
        names = [name for name in names if "true" not in name and ("template" not in name or known)]
    else:
        outputs = [one for labelled in data or () for one in of_data(labelled, seed)]
        chosen = [random.permutation(len(outputs)) for _ in range(orders)]
    rows = compare(outputs, names, chosen, every, running)
    table = tables.table("known", "MAE", "CRPS", "change", "95 %", "at arrival: MAE", "CRPS")
    for row in rows:
        low, high = row["crps_change_interval"]
        shown = (f"{row[name]:.1f}" for name in ("absolute", "crps"))
        first = (f"{row[name]:.1f}" for name in ("first_absolute", "first_crps"))
        table.add_row(row["known"], *shown, f"{row['crps_change']:+.1%}", f"{low:+.1%} to {high:+.1%}", *first)
    tables.show(table)
    about = {
        "outputs": len(outputs),
        "cut": sum(one.was_cut for one in outputs),
        "from": trace.name if trace is not None else [labelled.partition("=")[0] for labelled in data or ()],
        "every": every,
        "running": running,
        "orders": len(chosen),
        "seed": seed,
    }
    write({"data": about, "results": rows, **describe()}, json_file)
