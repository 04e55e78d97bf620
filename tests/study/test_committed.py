"""The committed results of claims: what was declared, what follows from it, and what their arms really cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from loopwise.study.claims import CLAIM, read_claim, read_results
from loopwise.study.experiment import Experiment
from loopwise.study.page import write_page
from loopwise.train.estimate import estimate_run

ROOT = Path(__file__).parents[2]
DECLARED = sorted(path.parent for path in ROOT.glob(f"claims/*/{CLAIM}"))
FINISHED = [folder for folder in DECLARED if (folder / "results.json").is_file()]

# Declared, and not carried out yet.
PENDING: set[str] = set()


def test_there_are_claims() -> None:
    assert {folder.name for folder in DECLARED} >= {"latent_thoughts", "depth_scaling", "test_time_depth", "icl_loops"}


@pytest.mark.parametrize("folder", DECLARED, ids=lambda folder: folder.name)
def test_a_declaration_reads_at_every_scale_and_has_its_results(folder: Path) -> None:
    claim = read_claim(folder)
    for scale in ("cpu", *claim.scale):
        assert list(Experiment.read(folder, scale).arms) == list(claim.arms)
    assert (folder in FINISHED) != (folder.name in PENDING)


@pytest.mark.parametrize("folder", FINISHED, ids=lambda folder: folder.name)
def test_results_are_those_of_the_declaration(folder: Path, tmp_path: Path) -> None:
    results = read_results(folder)  # checks hashes, arms, seeds and that the verdict follows from the interval
    assert results["core_minutes"] <= 1.5 * read_claim(folder).budget_core_minutes
    page = write_page(folder, tmp_path / "docs" / "claims").read_text(encoding="utf-8")
    committed = (ROOT / "docs" / "claims" / f"{folder.name}.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if "](" not in line] == [
        line for line in committed.splitlines() if "](" not in line
    ]
    assert (folder / "results.png").is_file()


@pytest.mark.parametrize("folder", FINISHED, ids=lambda folder: folder.name)
def test_arms_cost_what_the_results_say(folder: Path) -> None:
    experiment, results = Experiment.read(folder), read_results(folder)
    for arm in results["arms"]:
        config = experiment.arms[arm["name"]]
        found = estimate_run(config, flops_per_second=1.0)  # a model that is edited is as large as its largest stage
        assert found.parameters_unique == arm["params"]
        assert config.num_steps == arm["steps"]
        # Where loop counts are sampled, the seeds of the arm differ a little.
        assert math.isclose(found.flops, arm["flops"], rel_tol=0.05), arm["name"]
