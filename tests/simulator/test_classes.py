"""Classes of service in the simulator: as the gateway has them, with their shares."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ares.policy import preset
from ares.simulator.classes import ClassesError, SimulatedClass, assign, read_classes
from ares.simulator.cluster import Outcome, Simulation
from ares.simulator.error_models import ERROR_MODELS
from ares.simulator.metrics import longest_gap_s, summary
from ares.simulator.sweep import points
from tests.simulator.test_reference import small, workload

pytestmark = pytest.mark.timeout(600)  # the simulator may have to be compiled first

TTFT_S, TPOT_S = 4.0, 0.06


def written(folder: Path, text: str) -> Path:
    path = folder / "classes.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read_as_the_gateway_reads_its_classes(tmp_path: Path) -> None:
    path = written(
        tmp_path, "classes:\n  batch: {share: 0.3, rank: 1, ttft_s: 60, gap_s: none}\n  chat: {share: 0.7}\n"
    )
    classes = read_classes(path)
    assert classes["batch"] == SimulatedClass(share=0.3, rank=1, ttft_s=60.0, gap_s="none")
    assert (classes["chat"].gap_s, classes["chat"].rank) == (None, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("classes: {batch: {rank: 1}}", "classes.batch.share: Field required"),
        ("classes: {batch: {share: 0.5, gap: 2}}", "classes.batch.gap: Extra inputs"),
        ("classes: {batch: {share: 0.5, gap_s: 0}}", "classes.batch.gap_s.*greater than 0"),
        ("classes: {a: {share: 0.6}, b: {share: 0.6}}", "more than 1 together"),
        ("classes: {default: {share: 0.6}}", "default is the name"),
        ("classes: {}", "at least 1 item"),
        ("workers: [a]\nclasses: {a: {share: 0.6}}", "workers: Extra inputs"),
        ("[1", "classes.yaml"),
        ("classes: !!bool now", "classes.yaml"),
        ("", "classes.yaml: the file"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ClassesError, match=said):
        read_classes(written(tmp_path, text))
    with pytest.raises(ClassesError, match=r"no\.yaml"):
        read_classes(tmp_path / "no.yaml")


def test_shares_are_those_of_the_file_and_depend_on_the_seed_alone() -> None:
    classes = {"a": SimulatedClass(share=0.2), "b": SimulatedClass(share=0.5)}
    chosen = assign(classes, 20_000, 3)
    assert np.bincount(chosen) / 20_000 == pytest.approx([0.3, 0.2, 0.5], abs=0.02)
    assert (assign(classes, 20_000, 3) == chosen).all()
    assert (assign(classes, 20_000, 4) != chosen).any()
    assert set(assign({"a": SimulatedClass(share=1.0)}, 1000, 0).tolist()) == {1}
    assert set(assign({}, 1000, 0).tolist()) == {0}


def full(classes: dict[str, SimulatedClass]) -> Outcome:
    """A run of a cluster that cannot hold all at a time."""
    chosen = preset("ares")
    chosen = chosen.for_objectives(TTFT_S)
    work = workload(0, 400, 10.0, longest=900)
    decode, prefill = [small(4000)] * 3, [small(60_000)]
    simulation = Simulation(work, decode, prefill, chosen, "ares", ERROR_MODELS["exact"], gap_s=1.0, classes=classes)
    simulation.ttft_s, simulation.tpot_s = TTFT_S, TPOT_S
    return simulation.run()


def figures(classes: dict[str, SimulatedClass]) -> dict[str, Any]:
    return dict(summary(full(classes), 1.0, TTFT_S, TPOT_S)["classes"])


def test_who_is_of_a_higher_class_enters_first() -> None:
    found = figures({"first": SimulatedClass(share=0.3, rank=-1), "last": SimulatedClass(share=0.3, rank=1)})
    means = [found[name]["ttft_s"]["mean"] for name in ("first", "default", "last")]
    assert means == sorted(means)
    assert means[2] > 1.5 * means[0]
    assert sum(part["requests"] for part in found.values()) == 400


def test_each_class_is_judged_by_its_own_objectives() -> None:
    found = figures({"never": SimulatedClass(share=0.5, ttft_s=1e-6)})
    assert found["never"]["slo_share"] == 0.0
    assert found["default"]["slo_share"] > 0.2


def test_a_batch_class_without_a_bound_is_suspended_before_an_interactive_one() -> None:
    outcome = full({"batch": SimulatedClass(share=0.5, ttft_s=60.0, tpot_s=1.0, gap_s="none")})
    stood_still = longest_gap_s(outcome) > 1.0
    interactive, batch = (stood_still[outcome.class_of == number].mean() for number in (0, 1))
    assert batch > 2.0 * interactive > 0.0


def test_a_sweep_averages_each_class() -> None:
    entry = summary(full({"batch": SimulatedClass(share=0.5)}), 1.0, TTFT_S, TPOT_S)
    other = entry | {"classes": {"batch": entry["classes"]["batch"] | {"slo_share": 0.0}}}
    (point,) = points([entry, other])
    assert point["classes"]["batch"]["slo_share"] == pytest.approx(entry["classes"]["batch"]["slo_share"] / 2)
    assert point["classes"]["default"]["ttft_s"]["p99"] == entry["classes"]["default"]["ttft_s"]["p99"]
