"""Edits of folders that are interrupted, run out of room, or find something in their way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import loopwise
from loopwise.edit.disk import carry_out, plan_disk_edit
from loopwise.edit.shards import write_shards
from loopwise.edit.text import parse
from loopwise.edit.workplace import work_folder
from loopwise.io.tensors import read_checkpoint

# Runs an edit in a process that may write no file of more than so many bytes, as a full disk.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from loopwise.cli.main import main
sys.exit(main(["edit", *sys.argv[2:]]))
"""


def plan(source: Path, text: str = "stack(2)", **options: Any) -> Any:
    return plan_disk_edit(source, [parse(text)], **options)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sharded tiny Llama with a tokenizer file that is larger than its shards."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source", max_shard_size="40KB")
    assert len(read_checkpoint(tmp_path / "source").files) > 3
    return tmp_path / "source"


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def assert_is_stacked(target: Path) -> None:
    new = AutoModelForCausalLM.from_pretrained(target)
    want = loopwise.materialize(tiny_model("llama"), loopwise.Plan.parse("(0-5)x2")).state_dict()
    assert new.state_dict().keys() == want.keys()
    assert all((new.state_dict()[name] == want[name]).all() for name in want)


def limited(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(limit), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_room_for_a_file_leaves_what_can_go_on(source: Path, tmp_path: Path) -> None:
    """The last files are small enough, the first are not."""
    target = tmp_path / "new"
    sizes = [shard.num_bytes for shard in plan(source).shards]
    limit = sorted(sizes)[1]
    assert min(sizes) < limit < max(sizes)
    done = limited(limit, source, target, "--op", "stack(2)")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: File too large") and done.stderr.count("\n") == 1
    assert not target.exists()
    work = work_folder(target)
    model = work / "model"
    assert not (model / "config.json").exists() and not list(model.glob("*.part"))


def test_an_interrupted_edit_goes_on_with_what_is_missing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    planned = plan(source)
    count = 0

    def interrupt(size: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(planned, target, progress=interrupt)
    model = work_folder(target) / "model"
    kept = {path.name: path.stat().st_ino for path in model.iterdir()}
    assert kept and not target.exists() and not any(name.endswith(".part") for name in kept)
    with pytest.raises(ValueError, match=r"no config.json|not a checkpoint"):
        loopwise.load(model)
    assert carry_out(plan(source), target) == sorted(kept)
    assert {name: (target / name).stat().st_ino for name in kept} == kept
    assert_is_stacked(target)
    assert hidden(tmp_path) == []


@pytest.fixture
def interrupted(source: Path, tmp_path: Path) -> Path:
    """The work folder of an edit of which one file is written."""
    work = work_folder(tmp_path / "new")
    planned = plan(source)
    with pytest.raises(KeyboardInterrupt):
        carry_out(planned, tmp_path / "new", progress=lambda size: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not work.exists(), "nothing was whole yet"
    (work / "model").mkdir(parents=True)
    (work / "job.json").write_text(json.dumps(planned.fingerprint()), encoding="utf-8")
    write_shards(planned.shards[:1], planned.checkpoint, work / "model", lambda size: None)
    return work


def test_a_source_that_has_changed_is_refused(source: Path, interrupted: Path, tmp_path: Path) -> None:
    first = sorted(source.glob("*.safetensors"))[0]
    os.utime(first, ns=(1, 1))
    with pytest.raises(ValueError, match="the source has changed since the interrupted edit"):
        carry_out(plan(source), tmp_path / "new")
    assert interrupted.exists() and not (tmp_path / "new").exists()


def test_another_edit_does_not_go_on_with_it(source: Path, interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an interrupted edit of source with stack\(\) in mode materialize is in"):
        carry_out(plan(source, "prune([1])"), tmp_path / "new")
    with pytest.raises(ValueError, match="files of other sizes"):
        carry_out(plan(source, shard_size=0), tmp_path / "new")


def test_a_file_that_was_touched_is_found(source: Path, interrupted: Path, tmp_path: Path) -> None:
    path = next((interrupted / "model").glob("*.safetensors"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="holds something else"):
        carry_out(plan(source), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_processes_do_not_write_one_folder(source: Path, interrupted: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(interrupted / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another process"):
            carry_out(plan(source), tmp_path / "new")
    carry_out(plan(source), tmp_path / "new")
    assert_is_stacked(tmp_path / "new")


def test_a_strange_folder_in_the_way_is_left_alone(source: Path, tmp_path: Path) -> None:
    work = work_folder(tmp_path / "new")
    (work / "model").mkdir(parents=True)
    (work / "model" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is in the way and no interrupted edit"):
        carry_out(plan(source), tmp_path / "new")
    assert (work / "model" / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_check_that_fails_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 12
        raise ValueError("it is wrong")

    with pytest.raises(ValueError, match="it is wrong"):
        carry_out(plan(source), tmp_path / "new", check=check)
    assert not (tmp_path / "new").exists() and hidden(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True)
    if not done or done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(source: Path, small_disk: Path) -> None:
    with pytest.raises(ValueError, match=r"4\d\d kB are needed beside .*disk, 4\d\d kB are free"):
        carry_out(plan(source, "stack(2)"), small_disk / "new")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_half_way(source: Path, small_disk: Path) -> None:
    """The weights fit, the tokenizer does not: the folder has no name until there is room, then it goes on."""
    (source / "tokenizer.json").write_bytes(b"x" * 300_000)
    command = ["edit", str(source), str(small_disk / "new"), "--op", "repeat(1, 3)"]
    code = f"import sys; from loopwise.cli.main import main; sys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No space left on device")
    assert "the same command goes on" in done.stderr
    assert hidden(small_disk) == [".new.edit"] and not (small_disk / "new").exists()
    assert not (small_disk / ".new.edit" / "model" / "config.json").exists()
    (source / "tokenizer.json").write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "went on with" in done.stderr
    assert AutoModelForCausalLM.from_pretrained(small_disk / "new").config.num_hidden_layers == 8
    assert hidden(small_disk) == []


def test_a_source_that_changes_while_it_is_read_is_refused(source: Path, tmp_path: Path) -> None:
    planned = plan(source)
    os.utime(sorted(source.glob("*.safetensors"))[0], ns=(1, 1))
    with pytest.raises(ValueError, match="has changed while it was read"):
        carry_out(planned, tmp_path / "new")
    assert not (tmp_path / "new").exists()
