"""`loopwise train`: what it writes, how it stops and goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loopwise
from loopwise.loop.depth import UniformDepth
from loopwise.recipes import find
from loopwise.train import checkpoints
from loopwise.train.config import override
from loopwise.train.metrics import read_metrics
from loopwise.train.optim import AdamWConfig
from loopwise.train.run import CHECKPOINTS, METRICS, Run
from tests.train.runs import assert_same_state, timeless

Main = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

TINY = (
    "steps=6",
    "batch_size=4",
    "model.width=16",
    "model.heads=2",
    "log_every=2",
    "evaluation.rows=8",
    "evaluation.every=0",
    "saving.every=2",
)
TEXT = ("model.width=16", "model.heads=2", "batch_size=2", "evaluation.rows=2", "data.length=16", "steps=4")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOOPWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def lines_of(folder: str | Path) -> list[dict]:
    return [timeless(line) for line in read_metrics(Path(folder) / METRICS)]


def test_a_recipe_fills_a_run_folder_that_replays_and_loads(run: Main) -> None:
    code, out, err = run("train", "looped", *TINY)
    assert (code, err) == (0, "")
    shown = out.splitlines()
    assert shown[0].startswith("looped: ") and "plan core:(0)x4, 6 steps of 4 rows" in shown[0]
    assert [line.split(",")[0] for line in shown[1:-1]] == ["step 2/6", "step 4/6", "step 6/6"]
    assert shown[-1] == "done: runs/looped"
    found = {path.name for path in Path("runs/looped").iterdir()}
    assert found == {"config.json", "metrics.jsonl", "checkpoints", "samples", "plots", "model"}
    logits = loopwise.load("runs/looped/model")(torch.ones(1, 3, dtype=torch.long), loops=2).logits
    assert logits.isfinite().all()

    assert run("train", "runs/looped/config.json", "--out", "again")[0] == 0
    assert lines_of("again") == lines_of("runs/looped")
    assert run("train", "runs/looped") == (0, "runs/looped: all 6 steps are done\n", "")


def test_a_run_that_is_stopped_goes_on_to_the_same_end(run: Main) -> None:
    assert run("train", "looped", *TINY, "--out", "whole")[0] == 0
    code, out, _ = run("train", "looped", *TINY, "--out", "parts", "--stop-after", 3)
    assert code == 0 and out.endswith("stopped at step 3 of 6: parts, go on with: loopwise train parts\n")
    code, out, _ = run("train", "parts")
    assert code == 0 and "from step 3" in out
    assert lines_of("parts") == lines_of("whole")
    assert_same_state(Run.open("parts").tensors(), Run.open("whole").tensors())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint(run: Main, number: signal.Signals) -> None:
    def interrupt() -> None:
        path = Path("run") / METRICS
        until = time.monotonic() + 60
        while not (path.is_file() and path.read_bytes().count(b"\n") > 1) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    sender = threading.Thread(target=interrupt)
    sender.start()
    code, out, err = run("train", "looped", *TINY, "steps=100000", "--out", "run")
    sender.join()
    assert (code, err) == (130, "stopping after this step\ninterrupted\n")
    saved = checkpoints.latest(Path("run") / CHECKPOINTS)
    assert saved is not None
    step = checkpoints.read_meta(saved)["step"]
    assert out.endswith(f"stopped at step {step} of 100000: run, go on with: loopwise train run\n")
    assert signal.getsignal(number) == before
    assert run("train", "run", "--stop-after", 1)[0] == 0
    assert Run.open("run").carry.step == step + 1


def test_a_loss_that_is_no_number_names_step_batch_and_checkpoint(run: Main) -> None:
    code, out, err = run("train", "looped", *TINY, "optimizer=adamw", "optimizer.lr=1e6", "saving.every=1")
    assert code == 2 and err.count("\n") == 1, err
    assert "error: step " in err and "on batch " in err and "runs/looped/checkpoints/step-" in err
    assert "done" not in out and not Path("runs/looped/model").exists()


def test_a_full_disk_loses_nothing(run: Main) -> None:
    """The limit on the size of a file stands for the disk; it fails in the middle of a file as a disk does."""
    assert run("train", "looped", *TINY, "--out", "whole")[0] == 0
    assert run("train", "looped", *TINY, "--out", "run", "--stop-after", 2)[0] == 0
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        code, _, err = run("train", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2 and err.startswith("error: cannot write checkpoint run/checkpoints/step-00000004: "), err
    assert [path.name for path in (Path("run") / CHECKPOINTS).iterdir()] == ["step-00000002"]
    assert run("train", "run")[0] == 0
    assert lines_of("run") == lines_of("whole")


def test_recipes_in_a_file(run: Main, refused: Refused) -> None:
    text = "from loopwise.recipes.quickstart import looped\nfrom loopwise.train.config import RunConfig\n"
    Path("one.py").write_text(text + "def mine() -> RunConfig:\n    return looped()\n")
    Path("two.py").write_text(Path("one.py").read_text() + "def other() -> RunConfig:\n    return looped()\n")
    Path("none.py").write_text("x = 1\n")
    Path("broken.py").write_text("1 / 0\n")
    assert run("train", "one.py", *TINY, "steps=1", "--out", "one")[0] == 0
    assert run("train", "two.py:other", *TINY, "steps=1", "--out", "two")[0] == 0
    assert refused("train", "two.py") == "two.py has 2 recipes (mine, other): name one as two.py:FUNCTION"
    assert refused("train", "two.py:third").startswith("two.py has no function 'third'")
    assert refused("train", "none.py").startswith("none.py has no recipe")
    assert refused("train", "broken.py") == "broken.py cannot be run: ZeroDivisionError: division by zero"
    assert refused("train", "absent.py") == "absent.py does not exist"


@pytest.mark.parametrize("recipe", ["looped", "tour", "icl_looped"])
def test_a_dry_run_says_what_it_costs_and_writes_nothing(run: Main, recipe: str) -> None:
    code, out, err = run("train", recipe, "--dry-run")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["plan", "parameters", "steps", "FLOPs", "memory", "time"]
    assert not list(Path().iterdir())


def test_bare_words_choose_components() -> None:
    config = find("looped")
    changed = override(
        config, ["optimizer=adamw", "optimizer.beta2=0.9", "depth=uniform", "depth.low=1", "depth.high=3"]
    )
    assert isinstance(changed.optimizer, AdamWConfig) and changed.optimizer.beta2 == 0.9
    assert changed.depth == UniformDepth(low=1, high=3)
    assert override(config, ["trackers=tensorboard"]).trackers[0].kind == "tracker.tensorboard"
    task = override(config, ["data.task=p_hop", "data.task.hops=[1, 2]"]).data.task  # type: ignore[attr-defined]
    assert (task.kind, task.hops) == ("task.p_hop", (1, 2))
    assert override(config, ["steps=7", "model.plan=core:(0)x2"]).model.plan == "core:(0)x2"  # type: ignore[attr-defined]


def test_a_folder_of_a_model_is_no_run(run: Main, refused: Refused, model_folder: Path) -> None:
    model_folder.rename("looped")
    assert run("train", "looped", *TINY, "steps=1", "--out", "run")[0] == 0
    assert refused("train", "looped", "--out", "looped").startswith("looped is not a run folder and not empty")
    assert refused("train", "run/model") == "run/model is a folder, but not of a run: name a recipe or a run folder"
    (Path("run") / "config.json").write_text("{")
    assert refused("train", "run").startswith("run/config.json is not JSON")


STAGE = '[{"kind":"stage","steps":1},{"kind":"stage","steps":1,%s}]'
BAD = [
    (["lopped"], "'lopped' is neither a recipe nor a run folder; did you mean 'looped'?"),
    (["looped", "stepps=3"], "override 'stepps': run has no field 'stepps'; did you mean 'steps'?"),
    (["looped", "optimizer.lrr=1"], "override 'optimizer.lrr': optimizer.muon has no field 'lrr'; did you mean 'lr'?"),
    (["looped", "steps"], "override 'steps': write field=value"),
    (["looped", "steps=zero"], "run: steps='zero' must be an integer"),
    (["looped", "steps=0"], "run: steps=0 must be at least 1"),
    (["looped", "optimizer=muo"], "unknown component 'optimizer.muo'; did you mean 'optimizer.muon'?"),
    (["looped", "depth=poison"], "unknown component 'depth.poison'; did you mean 'depth.poisson'?"),
    (["looped", "depth.mean=3"], "override 'depth.mean': depth is not set; choose one first, such as depth="),
    (["looped", "stages.0.plan=0"], "override 'stages.0.plan': '0' is no index of a list of 0"),
    (["looped", "clip.a=1"], "override 'clip.a': clip is a single value"),
    (["looped", "name=../x"], "run: name='../x' must be a name without '/'"),
    (["looped", "model.width=63"], "model.decoder: heads=4 must divide width=63"),
    (["looped", "model.plan=core:(9)x2"], "bad plan 'core:(9)x2': layer 9 does not exist"),
    (["looped", "stages=" + STAGE % '"plan":"core:(1)x2"'], "stages.1: bad plan 'core:(1)x2': layer 1 does not exist"),
    (["looped", "stages=" + STAGE % '"trainable":["x*"]'], "stages.1: trainable='x*' matches no parameter"),
    (["looped", "--stop-after", "0"], "--stop-after 0: use at least 1"),
    (["looped", "--device", "nowhere"], "device='nowhere': this machine or this build of torch has no such device"),
    (["folder"], "folder is a folder, but not of a run"),
    (["looped", "--out", "taken"], "taken is not a run folder and not empty"),
    (["looped", "--out", "file.txt"], "file.txt is not a run folder and not empty"),
    (["file.json"], "file.json is not JSON"),
    (["other.json"], "other.json is not the config of a run: its kind is 'update.add', not 'run'"),
    (["looped_text", "data.source=nowhere"], "nowhere does not exist"),
    (["looped_text", "data.source=empty.txt"], "empty.txt has no text in it"),
    (["looped_text", "data.source=file.txt"], "data.text: the corpus has 5 tokens, rows of length 256 need 771"),
    (["looped_text", "data.source=bad.jsonl"], "bad.jsonl: document 2 is int, not a text"),
    (["finetune"], "model.source is not set: name a checkpoint"),
    (["finetune", "model.source=./nowhere", "data.source=long.txt"], "./nowhere does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments)[:40] for arguments, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(refused: Refused, arguments: list[str], message: str) -> None:
    for folder in ("folder", "taken"):
        Path(folder).mkdir()
    contents = {
        "taken/file": "x",
        "file.txt": "text",
        "file.json": "{",
        "other.json": '{"kind": "update.add"}',
        "empty.txt": "",
        "long.txt": "a text of some length\n" * 100,
        "bad.jsonl": '{"text": "a"}\n{"text": 3}\n',
    }
    for name, text in contents.items():
        Path(name).write_text(text)
    before = sorted(Path().rglob("*"))
    assert refused("train", *arguments).startswith(message)
    assert [path for path in sorted(Path().rglob("*")) if path.parts[0] != "cache"] == before


def test_a_run_that_has_begun_keeps_its_config_and_its_data(run: Main, refused: Refused) -> None:
    Path("corpus.txt").write_text("a text of some length\n" * 100)
    words = (*TEXT, "data.source=corpus.txt", "saving.every=0")
    assert run("train", "looped_text", *words, "--out", "run", "--stop-after", 2)[0] == 0
    assert refused("train", "run", "steps=9").startswith("run is a run that has begun, its config stays")
    assert "goes on in its own folder" in refused("train", "run", "--out", "other")
    assert refused("train", "looped_text", *words, "seed=1", "--out", "run").startswith("run holds another run")
    Path("corpus.txt").write_text("another text of some length\n" * 100)
    assert refused("train", "run").startswith("this run was started on data with fingerprint ")
    assert checkpoints.latest(Path("run") / CHECKPOINTS) is not None
    Path("corpus.txt").write_text("a text of some length\n" * 100)
    assert run("train", "run")[0] == 0


def test_adapters_are_saved_beside_the_model_that_holds_them(run: Main, model_folder: Path) -> None:
    Path("corpus.txt").write_text("A loop runs the same layers again, each pass with a state.\n" * 60)
    code, _, err = run(
        "train",
        "finetune",
        f"model.source={model_folder}",
        "model.plan=0 core:(1-2)x2 3",
        f"data.tokenizer={model_folder}",
        "data.source=corpus.txt",
        *TEXT[2:],
        "optimizer.lr=0.05",
        "micro_batch=1",
        "evaluation.samples=0",
        "--out",
        "run",
    )
    assert (code, err) == (0, "")
    assert (Path("run") / "adapter" / "adapter_config.json").is_file()
    trained, saved = Run.open("run").model.eval(), loopwise.load("run/model")
    assert str(loopwise.plan_of(saved)) == "0 core:(1-2)x2 3"
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected, found = (model(input_ids=tokens, use_cache=False).logits for model in (trained, saved))
        before = loopwise.load(model_folder, plan="0 core:(1-2)x2 3")(input_ids=tokens, use_cache=False).logits
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - before).abs().max() > 1e-3
    code, out, _ = run("generate", "run/model", "--prompt", "A loop", "-n", 2)
    assert code == 0 and out
    assert json.loads((Path("run") / "config.json").read_text())["adapters"]["kind"] == "adapters.lora"


def test_recipes_are_listed(run: Main) -> None:
    code, out, _ = run("recipes")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and names == sorted(names) and {"looped", "tour", "finetune"} <= set(names)
