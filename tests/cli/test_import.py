"""`loopwise import`, `export --format foreign`, and `--allow-untied`."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loopwise
from loopwise.checkpoints.loading import FAMILIES

GOLDENS = Path(__file__).parents[1] / "goldens"
MOR = GOLDENS / "mor_expert"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """The golden of Mixture-of-Recursions with attention of the second recursion of its own."""
    tensors = load_file(MOR / "model.safetensors")
    for name in [name for name in tensors if "block.0.self_attn" in name]:
        tensors[name.replace("layers.1.", "layers.2.")] = tensors[name] + 0.1
    folder = tmp_path / "untied"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((MOR / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("name", ["huginn", "mor_expert", "hrm", "looped_transformer", "albert"])
def test_import_and_back(run: Run, tmp_path: Path, name: str) -> None:
    own, back = tmp_path / "own", tmp_path / "back"
    code, out, err = run("import", GOLDENS / name, own)
    assert (code, err) == (0, "")
    model = loopwise.load(own)
    assert out.startswith(f"wrote {own} ({model.config.foreign['family']}, plan {loopwise.plan_of(model)}, ")
    code, out, _ = run("export", own, back, "--format", "foreign", "--no-tokenizer")
    assert code == 0 and out.startswith(f"wrote {back} (foreign, ")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (GOLDENS / name, back))
    assert sorted(ours) == sorted(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((back / "config.json").read_text()) == json.loads((GOLDENS / name / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "own"]
    assert stat.S_IMODE((own / "model.safetensors").stat().st_mode) & 0o600 == 0o600


def test_a_foreign_folder_may_be_exported_at_once(run: Run, tmp_path: Path) -> None:
    assert run("export", MOR, tmp_path / "back", "--format", "foreign", "--no-tokenizer")[0] == 0
    assert run("export", MOR, tmp_path / "own", "--loops", "2", "--no-tokenizer")[0] == 0
    assert str(loopwise.plan_of(loopwise.load(tmp_path / "own"))) == "0 core:(1)x2 2"


def test_the_tokenizer_comes_along(run: Run, tmp_path: Path, saved_model: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in [*MOR.iterdir(), *saved_model.glob("tokenizer*")]:
        (source / path.name).write_bytes(path.read_bytes())
    assert run("import", source, tmp_path / "own")[0] == 0
    assert loopwise.load_tokenizer(tmp_path / "own").decode([72]) == loopwise.load_tokenizer(saved_model).decode([72])


def test_untied_recursions(run: Run, refused: Callable[..., str], tmp_path: Path, untied: Path) -> None:
    line = refused("import", untied, tmp_path / "own")
    assert "model.layers.2.block.0.self_attn" in line and "--allow-untied" in line
    assert "--allow-untied" in refused("inspect", untied)
    assert not (tmp_path / "own").exists()
    code, out, err = run("import", untied, tmp_path / "own", "--allow-untied")
    assert code == 0 and "mor_untied, plan 0 r0:(1) r1:(2) r2:(3) 4" in out
    assert err.startswith("note: ") and "untied" in err and "separate layers" in err
    code, out, err = run("inspect", untied, "--allow-untied")
    assert code == 0 and "plan  0 r0:(1) r1:(2) r2:(3) 4" in out and "separate layers" in err
    assert run("export", tmp_path / "own", tmp_path / "back", "--format", "foreign", "--no-tokenizer")[0] == 0
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (untied, tmp_path / "back"))
    assert sorted(ours) == sorted(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_bad_input_writes_nothing(refused: Callable[..., str], tmp_path: Path, model_folder: Path) -> None:
    kept = sorted(path.name for path in tmp_path.iterdir())
    for source, message in (
        (tmp_path / "nowhere", "no config.json"),
        (model_folder, f"is of no family that loopwise knows: {FAMILIES[0].name}"),
    ):
        assert message in refused("import", source, tmp_path / "own")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("x")
    assert "is not empty" in refused("import", MOR, taken)
    assert "was not imported" in refused("export", model_folder, tmp_path / "own", "--format", "foreign")
    assert "writes no plan" in refused("export", MOR, tmp_path / "own", "--format", "foreign", "--loops", "2")
    assert "one of loopwise" in refused("export", MOR, tmp_path / "own", "--format", "unroll")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "taken"])


def test_a_plan_for_a_model_of_ours(run: Run, refused: Callable[..., str]) -> None:
    code, out, _ = run("inspect", GOLDENS / "ouro", "--plan", "core:(0-1)x2")
    assert code == 0 and "slots         4" in out
    assert "lacks loop 'core'" in refused("inspect", GOLDENS / "ouro", "--plan", "0-1")
    assert "layer 2 does not exist" in refused("inspect", GOLDENS / "ouro", "--plan", "core:(0-9)x2")
