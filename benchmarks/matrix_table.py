"""The table of docs/configurations.md, from benchmarks/results/matrix.json: `python benchmarks/matrix_table.py`."""

from tables import ROOT, renew, result, table

HEAD = "row|what|moves|tokens compared|wrong|pulled tokens, counted and expected|leases expired|how to run"


def main() -> None:
    """Put the table into the page."""
    rows = [
        [
            name,
            found["what"],
            f"{found['moves']} ({found['streams']} streams)",
            f"{found['tokens_compared']:,}",
            str(found["wrong_tokens"]),
            f"{found['pulled_tokens']:,}, {found['expected_pulled_tokens']:,}",
            str(found["leases_expired"]),
            f"`make matrix ROW={name}`",
        ]
        for name, found in result("matrix")["rows"].items()
    ]
    renew(ROOT / "docs" / "configurations.md", "matrix", table(HEAD, rows))


if __name__ == "__main__":
    main()
