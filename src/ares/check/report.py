"""The report of a check: a table for the terminal, and one JSON file to attach to a bug report."""

import itertools
import re
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ares.bench.environment import describe
from ares.check.rows import Outcome, Row
from ares.check.run import Plan, Report

_STYLES = {Outcome.PASS: "green", Outcome.WARN: "yellow", Outcome.FAIL: "bold red", Outcome.NOT_RUN: "dim"}
# Names and keys in a URL, before its host.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


def table(rows: list[Row]) -> Table:
    """Return all rows, grouped, each with what to do below its value."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    made.add_column("check", overflow="fold")
    made.add_column("outcome", no_wrap=True)
    made.add_column("measured, and what to do", overflow="fold")
    for group, members in itertools.groupby(rows, key=lambda row: row.group):
        made.add_row(Text(group, style="bold"), "", "")
        for row in members:
            measured = Text(without_credentials(row.value))
            if row.advice:
                measured.append(f"\n-> {row.advice}", style="dim" if row.outcome is Outcome.PASS else "")
            outcome = Text(row.outcome.value, style=_STYLES[row.outcome])
            made.add_row(Text(f"  {without_credentials(row.check)}"), outcome, measured)
    return made


def summary(rows: list[Row]) -> str:
    """Return how many checks ended in which way."""
    counts = Counter(row.outcome for row in rows)
    return ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome if counts[outcome])


def in_order(rows: list[Row]) -> list[Row]:
    """Return the rows with those of each group together, groups in the order of their first row."""
    groups = list(dict.fromkeys(row.group for row in rows))
    return sorted(rows, key=lambda row: groups.index(row.group))


def result(report: Report, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything for the JSON file: no key is in it, and no prompt but the random ones of these checks."""
    rows = [asdict(row) for row in in_order(report.rows)]
    for row in rows:
        row["check"], row["value"] = without_credentials(row["check"]), without_credentials(row["value"])
    return {
        "check": 1,
        "checked_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **describe(),
        "settings": {
            **settings,
            "instances": len(plan.urls),
            "outputs": plan.outputs,
            "tokens": plan.tokens,
            "step_limit_s": plan.step_s,
            "time_limit_s": plan.total_s,
        },
        "instances": report.instances,
        "summary": summary(report.rows),
        "failed": report.failed,
        "rows": rows,
    }


def without_credentials(text: str) -> str:
    """Return a text without the name and the key that its URLs may have."""
    return _CREDENTIALS.sub("", text)
