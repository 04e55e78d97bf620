from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loopwise.cli.compare import parse_seeds
from loopwise.cli.main import main
from loopwise.study.compare import RUNS, claim_folder
from loopwise.study.equal import equalise
from loopwise.study.pool import Job
from loopwise.train.config import read_config, write_config
from loopwise.train.run import CONFIG, Run
from tests.study.studies import do_here, small
from tests.study.test_compare import methods

RECIPES = """
from dataclasses import replace

from loopwise.train.config import RunConfig
from tests.study.studies import small


def loop() -> RunConfig:
    return small(name="loop")


def wide() -> RunConfig:
    return small(name="wide", model=replace(small().model, width=32))
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(RECIPES)
    return path


def test_a_comparison_from_the_command_line(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wide = small(name="wide", model=replace(small().model, width=32))
    found = equalise(methods(loop=small(name="loop", steps=4), wide=replace(wide, steps=4)), "steps")
    out = tmp_path / "out"
    claim_folder(out, found, [0, 1], "steps", 32)
    jobs = [Job(name=m.name, config=replace(m.config, seed=seed), rows=32) for seed in (0, 1) for m in found]
    do_here(jobs, out / RUNS)
    words = ["compare", f"{recipes}:loop", f"{recipes}:wide", "steps=4", "--seeds", "0,1", "--rows", "32"]
    assert main([*words, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    head, loop, wide, *_, last = captured.out.splitlines()
    assert head.split()[:2] == ["method", "parameters"] and loop.split()[0] == "loop" and wide.split()[0] == "wide"
    assert last == str(out / "comparison.png")
    found = json.loads((out / "comparison.json").read_text())
    assert [arm["steps"] for arm in found["arms"]] == [4, 4] and found["seeds"] == [0, 1]
    assert main([*words, "--out", str(out), "--equal", "flops"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} holds another comparison")


def test_a_dry_run_shows_what_each_spends(recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_config(small(name="saved", steps=12), tmp_path / "saved.json")
    run = tmp_path / "run"
    Run(small(name="begun", steps=3), run)
    targets = [f"{recipes}:wide", str(tmp_path / "saved.json"), str(run)]
    assert main(["compare", *targets, "--equal", "flops", "--dry-run"]) == 0
    wide, saved, begun = capsys.readouterr().out.splitlines()
    assert (wide.split()[0], saved.split()[0], begun.split()[0]) == ("wide", "saved", "begun")
    assert ", 6 steps" in wide and "(1.000 and 1.000 of the first)" in wide
    assert saved.split("parameters")[1] == begun.split("parameters")[1], "the same model is brought to the same steps"
    assert read_config(run / CONFIG).steps == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "run", "saved.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "'nonsense' is neither a recipe nor a run folder"),
        (["RECIPES"], "has 2 recipes (loop, wide): name one"),
        (["RECIPES:deep"], "has no function 'deep'"),
        (["steps=3"], "name at least one recipe"),
        (["RECIPES:loop", "RECIPES:loop"], "is named twice"),
        (["RECIPES:loop", "stepps=3"], "no field 'stepps'; did you mean 'steps'?"),
        (["RECIPES:loop", "--seeds", ""], "--seeds '': write different numbers"),
        (["RECIPES:loop", "--seeds", "1,1"], "--seeds '1,1': write different numbers"),
        (["RECIPES:loop", "--jobs", "0"], "--jobs 0: use at least 1"),
        (["RECIPES:loop", "--rows", "0"], "--rows 0: use at least 1"),
        (["RECIPES:loop", "--out", "TAKEN"], "is not empty and no comparison: name a new folder"),
        (["none.json"], "none.json: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [word.replace("RECIPES", str(recipes)).replace("TAKEN", str(tmp_path)) for word in words]
    assert main(["compare", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_seeds_are_read_with_spaces() -> None:
    assert parse_seeds("0, 1,12") == (0, 1, 12)
