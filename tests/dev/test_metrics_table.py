"""docs/metrics.md has every metric as the gateway has it."""

from pathlib import Path

from prometheus_client import generate_latest

from ares.gateway.records.metrics import Metrics
from ares_dev import metrics_table

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == metrics_table.filled(PAGE.read_text()), "run python -m ares_dev metrics"


def test_it_has_what_a_gateway_exports() -> None:
    lines = generate_latest(Metrics().registry).decode().splitlines()
    exported = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ")}
    read = {metric.name: metric.kind for metric in metrics_table.metrics()}
    assert {name: kind for name, kind in exported.items() if not name.endswith("_created")} == read


def test_labels_and_buckets(tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(
        "BUCKETS = (1, 2.5)\n"
        "a = Histogram('a_seconds', 'How ' 'long', labelnames=['x', 'y'], buckets=BUCKETS)\n"
        "b = Counter('b_total', 'Of b')\n"
        "c = Counter(words)\n"
    )
    a, b = metrics_table.metrics(tmp_path)
    assert a == metrics_table.Metric("a_seconds", "histogram", "How long", ("x", "y"), (1, 2.5))
    assert (b.labels, b.buckets) == ((), ())
