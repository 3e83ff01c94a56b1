"""What gateways export to Prometheus, and a Prometheus that scrapes it."""

import contextlib
import http.server
import json
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

from ares.free_ports import free_port
from ares.gateway.records.metrics import Metrics
from ares.gateway.records.model_label import exposition
from ares.terminal.http_client import open_direct

# Prometheus' own, of the scraped target; ours of the same name becomes `exported_instance`.
TARGET = {"job", "instance"}


def filled() -> CollectorRegistry:
    """Every metric of a model's gateway, with a sample of each of its series."""
    metrics = Metrics()
    for metric in vars(metrics).values():
        for count in range(1, 5):  # a metric takes exactly as many values as it has labels
            with contextlib.suppress(AttributeError, ValueError):
                metric.labels(*["x"] * count)
    return metrics.registry


def exported() -> list[Metric]:
    found = list(filled().collect())
    assert all(metric.samples for metric in found)
    return found


def labels_of(metric: Metric) -> list[str]:
    return [name for name in metric.samples[0].labels if name != "le"]


def known() -> dict[str, set[str]]:
    """The labels of every sample that a gateway of several models can export, by its name."""
    samples: dict[str, set[str]] = {}
    for metric in text_string_to_metric_families(exposition({"one": filled(), "two": filled()})):
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                labels = {"exported_instance" if name == "instance" else name for name in sample.labels}
                samples[sample.name] = labels
    return samples


@contextlib.contextmanager
def targets(pages: dict[str, str]) -> Iterator[int]:
    """Serve metrics by the name of a job; yield the port."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(pages[self.path[1:]].encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Prometheus:
    """A Prometheus that runs, and how Grafana asks it."""

    def __init__(self, port: int, log: Path) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"
        self._log = log

    def ask(self, path: str, **parameters: str) -> Any:
        with open_direct(f"{self._url}{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as reply:
            body = json.loads(reply.read())
        assert body["status"] == "success", body
        return body["data"]

    def found(self, expression: str, **variables: str) -> list[dict[str, str]]:
        """Return the labels of what a panel shows; waits until there is something, for at most a minute."""
        for name, value in ({"__rate_interval": "1m", "instance": ".*"} | variables).items():
            expression = expression.replace(f"${name}", value)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if results := self.ask("query", query=expression)["result"]:
                    return [dict(one["metric"]) for one in results]
            assert time.monotonic() < deadline, f"no data: {expression}\n{self._log.read_text()}"
            time.sleep(0.1)


def job(name: str, path: str, *addresses: str) -> dict[str, Any]:
    """Return a job of Prometheus' configuration."""
    return {"job_name": name, "metrics_path": path, "static_configs": [{"targets": list(addresses)}]}


@contextlib.contextmanager
def prometheus(folder: Path, jobs: list[dict[str, Any]], rules: Path | None = None) -> Iterator[Prometheus]:
    file, log, port = folder / "prometheus.yml", folder / "log", free_port("127.0.0.1")
    written = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [] if rules is None else [str(rules)],
        "scrape_configs": jobs,
    }
    file.write_text(yaml.safe_dump(written))
    flags = ["--storage.tsdb.path", str(folder / "data"), "--web.listen-address", f"127.0.0.1:{port}"]
    with log.open("w") as sink:
        process = subprocess.Popen(["prometheus", "--config.file", file, *flags], stdout=sink, stderr=sink)
    try:
        yield Prometheus(port, log)
    finally:
        process.kill()
        process.wait()
