"""Renew the tables of docs/predictor.md from benchmarks/results (`python benchmarks/predictor_tables.py`)."""

from typing import Any

from tables import ROOT, renew, result, table


def span(values: list[float], form: str = ".1f") -> str:
    """Return an interval."""
    return f"{values[0]:{form}} to {values[1]:{form}}"


def models(found: Any) -> str:
    """Every predictor on the test set."""
    rows = []
    for m in found["models"]:
        micros = " / ".join(f"{v:,.0f}" for v in m.get("microseconds_per_step", {}).values())
        coverage = f"{m['p90_coverage']:.1%} ({m['p90_coverage_at_or_below']:.1%})"
        numbers = [f"{m['mae']:.1f}", span(m["mae_interval"]), f"{m['relative_mae']:.3f}", f"{m['kendall_tau']:.2f}"]
        numbers += [f"{m['crps']:.1f}", f"{m['p50_coverage']:.1%}", coverage, f"{m['parameters']:,}", micros]
        rows.append([m["name"], *numbers])
    head = "predictor|MAE|95 %|relative MAE|tau|CRPS|P50|P90 coverage (plain)|parameters|µs at 1 / 64 / 256"
    return table(head, rows)


def differences(found: Any) -> str:
    """Ours against each of the others."""
    rows = []
    for d in found["differences"]:
        removed = found.get("reducible_error_removed", {}).get(d["baseline"], {})
        shares = [
            f"{removed[n]:.0%} ({span(removed[f'{n}_interval'], '.0%')})" if removed.get(n) is not None else ""
            for n in ("mae", "crps")
        ]
        share = f"{d['mae_below_share']:.1%} ({span(d['mae_below_share_interval'], '.1%')})"
        mae = f"{d['mae_below']:.1f} ({span(d['mae_below_interval'])})"
        rows.append([d["baseline"], mae, share, f"{d['crps_below']:.1f} ({span(d['crps_below_interval'])})", *shares])
    head = "against|MAE lower by (95 %)|share of it|CRPS lower by|reducible MAE removed|reducible CRPS removed"
    return table(head, rows)


def positions(found: Any) -> str:
    """Show the error at parts of the generation, one pair of each output, and of all pairs by how the output ended."""
    rows = []
    for m in found["models"]:
        parts = [*m["by_position"].values(), *(m["by_end"].get(end) for end in ("ended", "cut"))]
        rows.append([m["name"], *(f"{part['mae']:.1f}" if part is not None else "" for part in parts)])
    return table("predictor|0 %|25 %|50 %|75 %|ended by itself|cut", rows)


def kinds(found: Any) -> str:
    """How the kinds of structured prompts are followed."""
    rows = [[r["kind"], str(r["outputs"]), f"{r['followed']:.0%}", f"{r['cut']:.0%}"] for r in found["kinds"]]
    return table("kind|outputs|followed|cut by the limit", rows)


def overhead(found: Any) -> str:
    """TPOT with the predictor and without."""
    rows = []
    for case in found["cases"]:
        times, ratio = case["tpot_ms"], case["on_to_off"]
        shown = f"{ratio['median']:.4f}", f"{ratio['low']:.4f} to {ratio['high']:.4f}"
        rows.append([str(case["batch"]), f"{times['off']:.2f} ms", f"{times['on']:.2f} ms", *shown])
    return table("batch|TPOT off|TPOT on|on / off|95 %", rows)


def lengths(found: Any) -> str:
    """Show estimates by what is known of a request, without a model."""
    rows = []
    for r in found["results"]:
        mae, crps = (
            f"{r[name]:,.1f} ({r[f'{name}_change']:+.1%}; {span(r[f'{name}_change_interval'], '+.1%')})"
            for name in ("absolute", "crps")
        )
        rows.append([r["known"], mae, crps, f"{r['first_absolute']:,.1f}", f"{r['first_crps']:,.1f}"])
    return table("known|MAE (change; 95 %)|CRPS (change; 95 %)|MAE before the first token|CRPS", rows)


def changes() -> str:
    """Show what a change of instance costs each set of prompts."""
    rows = []
    for name, what in CHANGES.items():
        found = result(f"predictor-changes-{name}")
        for where, key in (("prefill", "behind_a_prefill"), ("move", "behind_a_move")):
            behind = found[key]
            costs = [
                f"{behind[n]['mae']:.2f} ({behind[n]['mae_above_share']:+.1%}; "
                f"{span(behind[n]['mae_above_share_interval'], '+.1%')})"
                for n in ("carried", "restarted")
            ]
            rows.append([what, where, f"{behind['mae_whole']:.2f}", *costs])
    return table("prompts|behind a|MAE on one instance|carried (change; 95 %)|lost (change; 95 %)", rows)


TABLES = {
    f"{name} {part.__name__}": (name, part)
    for name in ("open", "open-2173", "structured", "structured-1400", "qwen-open", "qwen-structured")
    for part in (models, differences, positions)
} | {
    "kinds": ("kinds", kinds),
    "other kinds": ("kinds-other", kinds),
    "kinds 1400": ("kinds-1400", kinds),
    "qwen kinds": ("kinds-qwen", kinds),
    "overhead": ("overhead", overhead),
}


# What changes of instance were evaluated on.
CHANGES = {"qwen-open": "Qwen, open", "qwen-structured": "Qwen, structured"}
# Traces and sets of prompts that `python -m ares_dev lengths` was run on.
LENGTHS = ("azure", "servegen", "mooncake", "gsm8k")


def main() -> None:
    """Renew every table of the page."""
    page = ROOT / "docs" / "predictor.md"
    for marker, (name, part) in TABLES.items():
        renew(page, marker, part(result(f"predictor-{name}")))
    renew(page, "changes", changes())
    for name in LENGTHS:
        renew(page, f"lengths {name}", lengths(result(f"lengths-{name}")))


if __name__ == "__main__":
    main()
