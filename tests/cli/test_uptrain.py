"""`loopwise uptrain`: what is trained for every edit, scores before and after, going on, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loopwise
from loopwise.cli.uptrain import parse_layers, summary
from loopwise.loop.depth import CurriculumDepth
from loopwise.recipes.uptrain import read_edit, uptrain_config
from loopwise.train import checkpoints
from loopwise.train.metrics import read_metrics
from loopwise.train.run import CHECKPOINTS, METRICS, Run
from tests.train.runs import assert_same_state

Main = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]
TINY = ("batch_size=4", "micro_batch=2", "data.length=16", "evaluation.rows=4", "evaluation.samples=0", "log_every=1")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOOPWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"A layer is visited {n} times, and a slot is a visit of it." for n in range(40)))
    return path


@pytest.fixture
def edited(run: Main, model_folder: Path) -> Callable[..., Path]:
    """Edits the tiny model; returns the new folder."""

    def edit(operator: str) -> Path:
        code, _, err = run("edit", model_folder, "edited", "--op", operator, "--verify")
        assert code == 0, err
        return Path("edited")

    return edit


def heal(run: Main, texts: Path, *words: object, steps: int = 2) -> str:
    code, out, err = run("uptrain", *words, "--text", texts, "--steps", steps, "--device", "cpu", *TINY)
    assert (code, err) == (0, ""), err
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    added = folder / "components.safetensors"
    return found | (load_file(added) if added.exists() else {})


def moved(before: Path, after: Path) -> set[str]:
    """Names of the tensors that training changed."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}


def layers_in(names: set[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))}


def test_new_layers_are_trained_alone(run: Main, edited: Callable[..., Path], texts: Path, model_folder: Path) -> None:
    folder = edited("llama_pro(every=2)")
    assert (read_edit(folder).zeroed, read_edit(folder).method) == ((2, 5), "new_layers")
    out = heal(run, texts, folder, "--source", model_folder)
    assert (
        re.search(r"held-out loss before: \d", out)
        and out.splitlines()[-1] == "healed model: runs/uptrain-edited/model"
    )
    changed = moved(folder, Path("runs/uptrain-edited/model"))
    assert layers_in(changed) == {2, 5} and all("layers." in name for name in changed)
    # Nothing was lost by this edit, so that there is no gap to close.
    assert "gap" not in out


def test_offsets_are_trained_alone_or_with_everything(run: Main, edited: Callable[..., Path], texts: Path) -> None:
    folder = edited("recursive(2, cycle, average, rank=2)")
    assert read_edit(folder).has_offsets and read_edit(folder).method == "full"
    heal(run, texts, folder, "--method", "offsets", "--out", "runs/offsets")
    changed = moved(folder, Path("runs/offsets/model"))
    assert changed and all(".relaxation." in name for name in changed)
    heal(run, texts, folder, "--out", "runs/full")
    assert any(".relaxation." not in name for name in moved(folder, Path("runs/full/model")))
    assert str(loopwise.plan_of(loopwise.load("runs/full/model"))) == "core:(0-1)x2"


def test_predictions_of_the_source_are_learned(
    run: Main, edited: Callable[..., Path], texts: Path, model_folder: Path
) -> None:
    folder = edited("recursive(2, cycle, average)")
    out = heal(run, texts, folder, "--source", model_folder, "--distill", 300, steps=8)
    lines = [line for line in read_metrics(Path("runs/uptrain-edited") / METRICS) if "distillation" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert 0 < lines[-1]["distillation"] < lines[0]["distillation"]
    assert re.search(r"held-out loss \d\S* -> \d\S*, source \d", out)


def test_a_core_is_trained_at_growing_depth(run: Main, edited: Callable[..., Path], texts: Path) -> None:
    folder = edited("retrofit(1, 2, 1)")
    config = uptrain_config(folder, text=str(texts), iterations=3, steps=40)
    depth = config.depth
    assert isinstance(depth, CurriculumDepth) and (depth.mean_at(0), depth.mean_at(10)) == (1, 3)
    assert (depth.steps, depth.sampler.max_grad) == (10, 8)
    out = heal(run, texts, folder, "--iterations", 3)
    assert "plan 0 core:(1-2)x3 3" in out
    model = loopwise.load("runs/uptrain-edited/model")
    assert str(loopwise.plan_of(model)) == "0 core:(1-2)x3 3"
    assert any("update" in name for name in moved(folder, Path("runs/uptrain-edited/model")))


def test_adapters_are_merged_into_the_healed_model(run: Main, edited: Callable[..., Path], texts: Path) -> None:
    folder = edited("prune([1])")
    heal(run, texts, folder, "--method", "lora", "--rank", 2)
    changed = moved(folder, Path("runs/uptrain-edited/model"))
    assert layers_in(changed) == {0, 1, 2} and not any("norm" in name or "embed" in name for name in changed)
    assert Path("runs/uptrain-edited/adapter/adapter_config.json").is_file()


def test_a_stopped_run_goes_on_bit_for_bit(run: Main, edited: Callable[..., Path], texts: Path) -> None:
    folder = edited("recursive(2, cycle, average, rank=1)")
    whole = heal(run, texts, folder, "--out", "runs/whole", steps=4)
    first = heal(run, texts, folder, "--out", "runs/parts", "--stop-after", 2, steps=4)
    assert "stopped at step 2 of 4" in first and "go on with: loopwise uptrain runs/parts" in first
    assert "->" not in first
    code, second, err = run("uptrain", "runs/parts", "--device", "cpu")
    assert (code, err) == (0, "")
    assert [line for line in second.splitlines() if "->" in line] == [
        line for line in whole.splitlines() if "->" in line
    ]
    assert_same_state(*(Run.open(folder).tensors() for folder in ("runs/whole", "runs/parts")))
    assert not moved(Path("runs/whole/model"), Path("runs/parts/model"))


def test_dry_runs_say_what_would_be_trained(run: Main, edited: Callable[..., Path], texts: Path) -> None:
    folder = edited("llama_pro(every=2)")
    out = heal(run, texts, folder, "--dry-run")
    assert out.splitlines()[0] == "trains      model.layers.2.*, model.layers.5.*"
    assert "time " in out and not Path("runs").exists()


def test_layers_can_be_named_where_the_folder_does_not_say(run: Main, model_folder: Path, texts: Path) -> None:
    out = heal(run, texts, model_folder, "--method", "new_layers", "--layers", "1,3", "--dry-run")
    assert out.splitlines()[0] == "trains      model.layers.1.*, model.layers.3.*"


def test_summaries() -> None:
    assert summary(5.0, 3.0, 1.0) == "held-out loss 5.0000 -> 3.0000, source 1.0000: 50.0% of the gap closed"
    assert summary(None, 3.0, None) == "held-out loss 3.0000"
    assert summary(1.0, 0.5, 1.0) == "held-out loss 1.0000 -> 0.5000, source 1.0000"
    assert parse_layers("4, 9") == (4, 9) and parse_layers(None) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distill", "1"], "--distill 1 needs --source"),
        (["--distill", "-1", "--source", "x"], "distill -1: must be at least 0"),
        (["--method", "offsets"], "has no offsets per visit to train"),
        (["--method", "new_layers"], "has no layers that start as the identity"),
        (["--method", "new_layers", "--layers", "1,1"], "different layers from 0"),
        (["--method", "new_layers", "--layers", "9"], "matches no parameter"),
        (["--layers", "1"], "this is 'full': leave them out"),
        (["--method", "retrofit"], "has no loop: edit with retrofit"),
        (["--method", "retrofit", "--iterations", "1"], "at least 2"),
        (["--stop-after", "0"], "use at least 1"),
        (["stepz=1"], "no field 'stepz'"),
        (["--source", "nowhere/at/all", "--distill", "1"], "nowhere/at/all"),
    ],
)
def test_what_cannot_be_healed_is_refused(
    refused: Refused, model_folder: Path, texts: Path, words: list[str], message: str
) -> None:
    options = [word for word in words if "=" not in word]
    values = [word for word in words if "=" in word]
    found = refused("uptrain", model_folder, "--text", texts, "--device", "cpu", *options, *TINY, *values)
    assert message in found
    assert not Path("runs").exists() or not list(Path("runs").rglob(CHECKPOINTS))


def test_folders_that_are_taken_or_no_models(refused: Refused, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    assert "no config.json" in refused("uptrain", tmp_path)
    assert "not a run folder and not empty" in refused("uptrain", model_folder, "--text", texts, "--out", model_folder)
    assert checkpoints.latest(model_folder / CHECKPOINTS) is None
