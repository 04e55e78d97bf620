"""The pages of families run, beside the tiny reference checkpoints under the names that the pages use."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from loopwise.checkpoints.loading import FAMILIES
from tests.test_docs import ROOT, blocks, run_console, run_python, tiny_folder

PAGES = sorted((ROOT / "docs" / "families").glob("*.md"))
GOLDENS = ROOT / "tests" / "goldens"
NAMES = {"mor": "mor_expert", "retrofit": "retrofit_llama", "trm": "trm_attention"}

__all__ = ["tiny_folder"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(
    page: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for golden in GOLDENS.iterdir():
        shutil.copytree(golden, tmp_path / golden.name)
    for name, golden in NAMES.items():
        shutil.copytree(GOLDENS / golden, tmp_path / name)
    shutil.copytree(tiny_folder, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings(), torch.random.fork_rng():
        for block in blocks(page):
            if block.words == ("python",):
                run_python(block, names, page)
            elif block.words == ("console",):
                run_console(block, page)


def test_every_family_has_a_page_and_the_index_names_it() -> None:
    index = (ROOT / "docs" / "families" / "index.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        assert ROOT / "docs" / "families" / f"{family.name}.md" in PAGES
        assert re.search(rf"^\| `{family.name}` \|.*\]\({family.name}\.md\) \|$", index, re.MULTILINE), family.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_plans_of_the_index_can_be_read() -> None:
    from loopwise.plan import Plan

    text = (ROOT / "docs" / "families" / "index.md").read_text(encoding="utf-8")
    plans = re.findall(r"`([a-z0-9()x: -]*\)x[0-9]+[a-z0-9()x: -]*|[0-9]+-[0-9]+(?: [0-9]+-[0-9]+)*)`", text)
    assert len(plans) > 20
    for plan in plans:
        assert Plan.parse(plan).num_slots
