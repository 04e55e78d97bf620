"""`loopwise export`."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loopwise
from loopwise.cli.export import export

Run = Callable[..., tuple[int, str, str]]
PLAN = "0 core:(1-2)x2 3"
PLAIN_LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = AutoTokenizer.from_pretrained(folder)("A visit of a layer", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save(model(ids).logits, folder + ".pt")
assert "loopwise" not in sys.modules
"""


@pytest.fixture
def looped_logits(saved_model: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = loopwise.attach(AutoModelForCausalLM.from_pretrained(saved_model).eval(), PLAN)
    ids = AutoTokenizer.from_pretrained(saved_model)("A visit of a layer", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return ids, model(ids).logits


def test_loopwise_format_carries_its_plan(run: Run, saved_model: Path, tmp_path: Path, looped_logits) -> None:
    import torch

    code, out, err = run("export", saved_model, tmp_path / "out", "--plan", PLAN)
    assert (code, err) == (0, "")
    assert str(tmp_path / "out") in out
    model = loopwise.load(str(tmp_path / "out"))
    assert str(loopwise.plan_of(model)) == PLAN
    ids, logits = looped_logits
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, logits)
    code, out, _ = run("inspect", tmp_path / "out", "--loops", "core=3")
    assert code == 0
    assert "plan  0 core:(1-2)x3 3" in out


def test_other_formats_load_without_loopwise(run: Run, saved_model: Path, tmp_path: Path, looped_logits) -> None:
    import torch

    folders = [str(tmp_path / format) for format in ("auto_map", "unroll")]
    for folder, format in zip(folders, ("auto_map", "unroll"), strict=True):
        code, _, err = run("export", saved_model, folder, "--plan", PLAN, "--format", format)
        assert (code, err) == (0, "")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", PLAIN_LOGITS, *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for folder in folders:
        assert torch.equal(torch.load(f"{folder}.pt"), looped_logits[1]), folder


def test_the_tokenizer_goes_along_unless_told_not_to(run: Run, saved_model: Path, tmp_path: Path) -> None:
    assert run("export", saved_model, tmp_path / "with", "--plan", PLAN)[0] == 0
    assert run("export", saved_model, tmp_path / "without", "--plan", PLAN, "--no-tokenizer")[0] == 0
    assert (tmp_path / "with" / "tokenizer.json").exists()
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_an_empty_folder_is_filled_and_readable_by_others(run: Run, saved_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    old = os.umask(0o022)
    try:
        assert run("export", saved_model, tmp_path / "out", "--plan", PLAN)[0] == 0
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "config.json").exists()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_full_folder_is_left_alone(refused: Callable[..., str], saved_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    assert "not empty" in refused("export", saved_model, out, "--plan", PLAN)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "0-9"], "layer 4 does not exist"),
        (["--plan", "0 (1-2)x"], "bad plan"),
        (["--plan", PLAN, "--loops", "cor=2"], "did you mean core"),
        ([], "--plan"),
    ],
)
def test_bad_input_writes_nothing(
    refused: Callable[..., str], saved_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in refused("export", saved_model, tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_destinations_that_cannot_be(refused: Callable[..., str], saved_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert "not a folder" in refused("export", saved_model, tmp_path / "file", "--plan", PLAN)
    assert "create it first" in refused("export", saved_model, tmp_path / "a" / "b", "--plan", PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_while_writing_leaves_nothing(saved_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    class Tokenizer:
        """Fails after the weights have been written."""

        def save_pretrained(self, folder: Path) -> None:
            assert (folder / "config.json").exists()
            raise OSError("disk full")

    model = loopwise.attach(AutoModelForCausalLM.from_pretrained(saved_model), PLAN)
    with pytest.raises(OSError, match="disk full"):
        export(model, tmp_path / "out", tokenizer=Tokenizer())
    assert list(tmp_path.iterdir()) == []
