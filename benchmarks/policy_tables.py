"""Renew the tables of the policy from benchmarks/results: docs/policy.md and README.md.

Run it as `python benchmarks/policy_tables.py`.
"""

from collections.abc import Callable
from typing import Any

from tables import ROOT, renew, result, table

STATIC = ("static-rr", "static-least-loaded")
COMPARED = (*STATIC, "paper", "ares")
RIVALS = ("llumnix", "balanceroute", "pausing", "past-future")
PARTS = (
    "static-least-loaded",
    "ares-no-prediction",
    "paper",
    "ares-rebalance",
    "ares-admission",
    "ares-suspension",
    "ares",
    "ares-oracle",
)


def cell(values: list[str], unit: str = "") -> str:
    """Return figures in the order of the presets, the last one bold."""
    return " / ".join([*values[:-1], f"**{values[-1]}{unit}**"])


def of(points: list[Any], load: float, preset: str) -> Any:
    """Return the point of a preset at a load."""
    return next(p for p in points if p["preset"] == preset and abs(p["load"] - load) < 1e-6)


def loads(points: list[Any]) -> list[float]:
    """Return the loads of a sweep."""
    return sorted({round(p["load"], 3) for p in points})


def shares(points: list[Any], load: float, presets: tuple[str, ...]) -> list[str]:
    """Return the requests that met all objectives, %."""
    return [f"{of(points, load, p)['slo_share'] * 100:.1f}" for p in presets]


def tpots(points: list[Any], load: float, presets: tuple[str, ...]) -> list[str]:
    """Return P99 TPOT, ms."""
    return [f"{of(points, load, p)['tpot_s']['p99'] * 1000:.0f}" for p in presets]


def sweep(found: Any) -> str:
    """Every load of a sweep."""
    rows = []
    for load in loads(found["points"]):
        met, slow = (figure(found["points"], load, COMPARED) for figure in (shares, tpots))
        waits = [f"{of(found['points'], load, p)['longest_wait_s']:.0f}" for p in COMPARED]
        gaps = [f"{of(found['points'], load, p)['longest_gap_s']['p99']:.0f}" for p in COMPARED]
        bounds = [r["slo_share_bound"] for r in found["runs"] if abs(r["load"] - load) < 1e-6]
        bound = f"{sum(bounds) / len(bounds) * 100:.0f}"
        rows.append([f"{load:g}", cell(met), cell(slow), " / ".join(waits), " / ".join(gaps), bound])
    head = "load|SLOs met, %: round robin / least loaded / `paper` / **`ares`**|P99 TPOT, ms|longest wait, s"
    head += "|longest gap of a stream, P99, s"
    return table(head + "|most that any policy could meet, %", rows)


def rivals(found: Any) -> str:
    """Every load of a sweep, for published rules and ours."""
    if not any(p["preset"] in RIVALS for p in found["points"]):
        return ""
    presets = (*RIVALS, "ares")
    rows = []
    for load in loads(found["points"]):
        met, slow = (figure(found["points"], load, presets) for figure in (shares, tpots))
        first = [f"{of(found['points'], load, p)['ttft_s']['p99']:.0f}" for p in presets]
        gaps = [f"{of(found['points'], load, p)['longest_gap_s']['p99']:.0f}" for p in presets]
        rows.append([f"{load:g}", cell(met), cell(slow), " / ".join(first), " / ".join(gaps)])
    names = " / ".join(f"`{name}`" for name in RIVALS)
    head = f"load|SLOs met, %: {names} / **`ares`**|P99 TPOT, ms|P99 TTFT, s|longest gap of a stream, P99, s"
    return table(head, rows)


def gains(found: Any) -> str:
    """Compare `ares` with round robin, and with the better static preset."""
    rows = []
    points = found["points"]
    for load in loads(points):
        ours = of(points, load, "ares")
        plain = of(points, load, "static-rr")
        static = [of(points, load, p) for p in STATIC]
        best, least = max(s["goodput_rps"] for s in static), min(s["tpot_s"]["p99"] for s in static)
        rows.append(
            [
                f"{load:g}",
                f"{ours['goodput_rps'] / plain['goodput_rps']:.2f}x",
                f"{ours['goodput_rps'] / best:.2f}x",
                f"{(ours['tpot_s']['p99'] / plain['tpot_s']['p99'] - 1) * 100:+.0f} %",
                f"{(ours['tpot_s']['p99'] / least - 1) * 100:+.0f} %",
            ]
        )
    return table(
        "load|goodput / round robin|goodput / better static|P99 TPOT / round robin|P99 TPOT / better static", rows
    )


def readme(found: Any) -> str:
    """Four loads in two columns."""
    points = found["points"]
    some = [load for load in loads(points) if load in (0.5, 0.9, 1.0, 1.5)]
    rows = [[f"{x:g}", cell(shares(points, x, COMPARED), " %"), cell(tpots(points, x, COMPARED))] for x in some]
    return table("load|SLOs met: round robin / least loaded / the paper's rule / **ares**|P99 TPOT, ms", rows)


def short(name: str) -> Callable[[Any], str]:
    """Return the table of a trace of short outputs."""

    def made(found: Any) -> str:
        presets = (*STATIC, "ares")
        rows = [
            [f"{x:g}", *(" / ".join(figure(found["points"], x, presets)) for figure in (shares, tpots))]
            for x in loads(found["points"])
        ]
        return table(f"load|{name}: SLOs met, %|P99 TPOT, ms", rows)

    return made


def parts(found: Any) -> str:
    """Show what each part does, and the effect of the error of predictions."""
    rows = [_ablation(preset, found["points"], preset) for preset in PARTS]
    for error in ("exact", "noise-30", "noise-60", "noise-100", "residual-life"):
        points = result(f"ablation-error-{error}")["points"]
        rows += [_ablation(f"ares, predictor `{error}`", points, "ares")]
    return table("preset|SLOs met at load 0.9 / 1.0 / 1.2, %|P99 TPOT, ms", rows)


def _ablation(name: str, points: list[Any], preset: str) -> list[str]:
    at = (0.9, 1.0, 1.2)
    met = " / ".join(shares(points, x, (preset,))[0] for x in at)
    return [name, met, " / ".join(tpots(points, x, (preset,))[0] for x in at)]


ERRORS = ("residual-life", "length-curves", "trained", "exact")


def load_curve(trace: str) -> Callable[[Any], str]:
    """Return the table of what knowledge of the lengths is worth at each load."""

    def made(_: Any) -> str:
        found = {error: result(f"load-curve-{trace}{error}")["points"] for error in ERRORS}
        rows = []
        for load in loads(found["exact"]):
            at = [of(points, load, "ares") for points in found.values()]
            met = [f"{p['slo_share'] * 100:.1f}" for p in at]
            slow = [f"{p['tpot_s']['p99'] * 1000:.0f}" for p in at]
            goodput = [f"{p['goodput_rps']:.3g}" for p in at]
            preempted = [f"{p['preemptions']:.0f}" for p in at]
            rows.append([f"{load:g}", *(" / ".join(v) for v in (met, slow, goodput, preempted))])
        names = " / ".join(f"`{error}`" for error in ERRORS)
        return table(f"load|SLOs met, %: {names}|P99 TPOT, ms|goodput, requests/s|preempted", rows)

    return made


GAPS = ("2", "30", "60", "120", "300", "none")


def gaps(_: Any) -> str:
    """Show what a bound on the gaps of streams costs, and where."""
    rows = []
    for bound in GAPS:
        points = result(f"gap-{bound}")["points"]
        found = [of(points, load, "ares") for load in (0.9, 1.0, 1.2)]
        static = [max(shares(points, load, STATIC), key=float) for load in (0.9, 1.0, 1.2)]
        rows.append(
            [
                bound,
                " / ".join(static),
                *(" / ".join(f"{read(p):.{digits}f}" for p in found) for read, digits in _OF_GAPS),
            ]
        )
    head = "`slo_gap_s`|met at load 0.9 / 1.0 / 1.2, %: better static|`ares`|P99 TPOT, ms|P99 TTFT, s"
    return table(head + "|longest gap of a stream: P90, s|P99, s", rows)


_OF_GAPS: tuple[tuple[Callable[[Any], float], int], ...] = (
    (lambda p: p["slo_share"] * 100, 1),
    (lambda p: p["tpot_s"]["p99"] * 1000, 0),
    (lambda p: p["ttft_s"]["p99"], 0),
    (lambda p: p["longest_gap_s"]["p90"], 0),
    (lambda p: p["longest_gap_s"]["p99"], 0),
)


def frontier() -> None:
    """Draw the bound on gaps against the goodput and the TTFT that it leaves."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, (met, first) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for load in (0.9, 1.0, 1.2):
        found = [of(result(f"gap-{bound}")["points"], load, "ares") for bound in GAPS]
        met.plot(GAPS, [p["slo_share"] * 100 for p in found], marker="o", label=f"load {load:g}")
        static = [max(map(float, shares(result(f"gap-{bound}")["points"], load, STATIC))) for bound in GAPS]
        met.plot(GAPS, static, marker="o", linestyle=":", color=met.lines[-1].get_color())
        first.plot(GAPS, [p["ttft_s"]["p99"] for p in found], marker="o", label=f"load {load:g}")
    met.set(xlabel="bound on the longest gap, s", ylabel="requests that meet all objectives, %", ylim=(0, 100))
    met.set_title("ares; dotted: the better static preset", fontsize=9)
    first.set(xlabel="bound on the longest gap, s", ylabel="P99 of the first token, s", yscale="log")
    met.legend()
    figure.savefig(ROOT / "docs" / "images" / "gaps.svg", metadata={"Date": None})


def scale(_: Any) -> str:
    """Show one cluster size per row."""
    rows = []
    for size in (8, 32, 64, 128, 256):
        runs = {r["preset"]: r for r in result(f"scale-{size}")["runs"]}
        two = [runs["static-least-loaded"], runs["ares"]]
        rows.append(
            [
                f"{size}",
                f"{runs['ares']['requests']:,}",
                cell([f"{r['imbalance']:.2f}" for r in two]),
                cell([f"{r['tpot_s']['p99'] * 1000:.0f}" for r in two]),
                cell([f"{r['slo_share'] * 100:.1f}" for r in two]),
                f"{runs['ares']['decision_ms']['p50']:.2f}",
            ]
        )
    head = "instances|requests|imbalance: least loaded / **`ares`**|P99 TPOT, ms|SLOs met, %|decision, median ms"
    return table(head, rows)


SWEEPS = ("sweep-paper-24gb-4", "sweep-paper-24gb-8", "sweep-paper-80gb-4", "sweep-paper-80gb-8")
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    **{name: (name, sweep) for name in (*SWEEPS, "sweep-servegen-24gb-4")},
    **{f"gains {name}": (name, gains) for name in (*SWEEPS, "sweep-servegen-24gb-4")},
    **{f"rivals {name}": (name, rivals) for name in (*SWEEPS, "sweep-servegen-24gb-4")},
    "azure": ("azure-80gb-4", short("Azure")),
    "mooncake": ("mooncake-80gb-4", short("Mooncake")),
    "parts": ("ablation-parts", parts),
    "load curve": ("load-curve-exact", load_curve("")),
    "load curve servegen": ("load-curve-servegen-exact", load_curve("servegen-")),
    "scale": ("scale-8", scale),
    "gaps": ("gap-none", gaps),
    "policy": ("sweep-paper-24gb-4", readme),
}


def main() -> None:
    """Renew every table of both pages."""
    for marker, (name, made) in TABLES.items():
        for page in (ROOT / "docs" / "policy.md", ROOT / "README.md"):
            renew(page, marker, made(result(name)))
    frontier()


if __name__ == "__main__":
    main()
