"""`loopwise edit`."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import loopwise
from loopwise.cli.common import current_umask
from loopwise.cli.edit import parse_size

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


def test_a_grown_model_loads_in_plain_transformers(run: Run, saved_model: Path, tmp_path: Path) -> None:
    code, out, err = run("edit", saved_model, tmp_path / "new", "--op", "llama_pro(every=2)", "--verify")
    assert (code, err) == (0, "")
    assert "4 -> 6 layers" in out and "streamed" in out
    assert "verified: the function of the source holds: logits differ by 0, allowed 0" in out
    ids = AutoTokenizer.from_pretrained(tmp_path / "new")("A visit of a layer", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        old, new = (AutoModelForCausalLM.from_pretrained(folder)(ids) for folder in (saved_model, tmp_path / "new"))
    assert torch.equal(old.logits, new.logits)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_tied_model_keeps_its_plan(run: Run, saved_model: Path, tmp_path: Path) -> None:
    operators = ["--op", "prune([0])", "--op", "stack(2)"]
    code, out, _ = run("edit", saved_model, tmp_path / "new", *operators, "--mode", "tie", "--verify")
    assert code == 0
    assert "4 -> 3 layers, plan (0-2)x2" in out
    assert "verified: the source under (1-3)x2 holds" in out
    assert str(loopwise.plan_of(loopwise.load(tmp_path / "new"))) == "(0-2)x2"


def test_a_dry_run_writes_nothing(run: Run, saved_model: Path, tmp_path: Path) -> None:
    code, out, err = run("edit", saved_model, tmp_path / "new", "--op", "solar(1)", "--shard-size", "90K", "--dry-run")
    assert (code, err) == (0, "")
    assert "4 layers -> 6 layers" in out and "new 0-2  old 0-2" in out and "new 3-5  old 1-3" in out
    assert (
        "201 kB -> " in out
        and "in 3 files" in out
        and "layers at model.layers" in out
        and out.endswith("nothing was written\n")
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        ("recursive(2, cycle, average, rank=-1)", "offsets per visit are computed"),
        ("retrofit(1, 2, 1)", "the loop gets components"),
        ("widen(mlp=64)", "widen changes shapes"),
    ],
)
def test_what_needs_the_model_says_so(run: Run, saved_model: Path, tmp_path: Path, operator: str, reason: str) -> None:
    code, out, _ = run("edit", saved_model, tmp_path / "new", "--op", operator, "--verify")
    assert code == 0
    assert f"edited in memory: {reason}" in out and "verified: the function of the source" in out
    assert (tmp_path / "new" / "tokenizer.json").exists()
    record = json.loads((tmp_path / "new" / "loopwise_edit.json").read_text(encoding="utf-8"))
    assert record["path"] == "in memory"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {0o666 & ~current_umask()}
    loopwise.load(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_an_edit_added_to_a_loop_is_not_dropped(
    run: Run, refused: Refused, saved_model: Path, tmp_path: Path
) -> None:
    assert run("edit", saved_model, tmp_path / "one", "--op", "retrofit(1, 2, 1)")[0] == 0
    assert "components of loops" in refused("edit", tmp_path / "one", tmp_path / "two", "--op", "llama_pro(2)")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_shared_blocks_are_unshared_or_refused(run: Run, refused: Refused, tmp_path: Path) -> None:
    for model_type in ("zamba", "zamba2"):
        tiny_model(model_type).save_pretrained(tmp_path / model_type)
    code, out, _ = run("edit", tmp_path / "zamba", tmp_path / "new", "--op", "repeat(1, 3)", "--verify")
    assert code == 0 and "zamba shares blocks between its layers" in out and "verified" in out
    message = refused("edit", tmp_path / "zamba2", tmp_path / "new2", "--op", "repeat(1, 3)")
    assert "shares" in message and not (tmp_path / "new2").exists()


def test_an_architecture_that_is_not_trusted_is_tried(refused: Refused, run: Run, tmp_path: Path) -> None:
    tiny_model("diffllama").save_pretrained(tmp_path / "source")
    edit = ["edit", tmp_path / "source", tmp_path / "new", "--op", "stack(2)"]
    assert "add --verify: DiffLlamaForCausalLM" in refused(*edit)
    message = refused(*edit, "--verify")
    assert "FAILS" in message and message.endswith("nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert run(*edit, "--mode", "tie", "--verify")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--op is missing"),
        (["--op", "stak(2)"], "did you mean 'stack'"),
        (["--op", "llama_pro(3)"], "does not divide 4 layers"),
        (["--op", "midas(3)"], "does not divide 4 layers"),
        (["--op", "prune([0, 1, 2, 3])"], "leaves nothing to visit"),
        (["--op", "prune([4])"], "cannot drop layer 4"),
        (["--op", "stack(2)", "--shard-size", "much"], "write a size such as 5GB"),
        (["--op", "stack(2)", "--shard-size", "0"], "write a size such as 5GB"),
    ],
)
def test_bad_input_writes_nothing(
    refused: Refused, saved_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in refused("edit", saved_model, tmp_path / "new", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_cannot_be(refused: Refused, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model_folder)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    for target, message in [
        (model_folder, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (tmp_path / "x" / ".." / "model", "create it first"),
        (model_folder / "inside", "lies inside the source"),
        (tmp_path / "link" / "inside", "lies inside the source"),
        (tmp_path / "file", "exists"),
        (tmp_path / "dangling", "exists"),
        (tmp_path, "exists"),
        (tmp_path / "a" / "b", "create it first"),
    ]:
        assert message in refused("edit", model_folder, target, "--op", "stack(2)"), target
    assert sorted(tmp_path.rglob("*")) == before


def test_sources_that_cannot_be(refused: Refused, model_folder: Path, tmp_path: Path) -> None:
    edit = [tmp_path / "new", "--op", "stack(2)"]
    assert "does not exist" in refused("edit", tmp_path / "nothing", *edit)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused("edit", tmp_path / "empty", *edit)
    weights = model_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    assert "is truncated" in refused("edit", model_folder, *edit)
    weights.rename(model_folder / "pytorch_model.bin")
    assert "save_pretrained, which writes safetensors" in refused("edit", model_folder, *edit)
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_is_filled(run: Run, saved_model: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert run("edit", saved_model, tmp_path / "new", "--op", "stack(2)")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.num_hidden_layers == 8


def test_copies_load_no_library(saved_model: Path, tmp_path: Path) -> None:
    code = """
import resource, sys
from loopwise.cli.main import main
assert main(["edit", *sys.argv[1:]]) == 0
assert not {"torch", "transformers", "numpy", "safetensors", "matplotlib"} & set(sys.modules)
"""
    for number, operator in enumerate(("stack(2)", "repeat(1, 3)", "prune([1])")):
        command = [sys.executable, "-c", code, str(saved_model), str(tmp_path / f"new{number}"), "--op", operator]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("200M", 2 * 10**8), ("5GB", 5 * 10**9), ("1.5k", 1500), ("7", 7), ("single", 0), (None, None)]
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert parse_size(text) == size
