"""Checkpoints: what is saved comes back bit for bit, and what is not whole is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from loopwise.io.folders import discard
from loopwise.train import checkpoints
from loopwise.train.checkpoint_format import INDEX, CheckpointError, read_index
from loopwise.train.checkpoints import clean, drop_after, latest, load, prune, read_meta, save, shapes, steps

FORK = multiprocessing.get_context("fork")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """One of every sort: dtypes, 0-d, empty, a view of a larger storage, transposed, a parameter, NaN and -0.0."""
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, generator=made)
    return {
        "model/layers.0.weight": torch.nn.Parameter(weight),
        "model/half": torch.randn(3, 5, generator=made).bfloat16(),
        "optimizer/layers.0.weight/step": torch.tensor(7 + seed),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "view": torch.randn(100, generator=made)[10:13],
        "transposed": torch.randn(4, 6, generator=made).t(),
        "odd": torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.float64),
    }


def blank(like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in like.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        raw = [tensor[name].detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        assert torch.equal(*raw), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_saved_comes_back_bit_for_bit_and_in_place(tmp_path):
    saved = tensors()
    path = save(tmp_path / "new" / "folder", 100, saved, {"stage": 1, "cursor": [3, {"epoch": 2}], "note": "ä"})
    assert path == tmp_path / "new" / "folder" / "step-00000100"
    given = blank(saved)
    pointers = {name: tensor.data_ptr() for name, tensor in given.items()}
    run = load(path, given)
    assert_same(given, saved)
    assert pointers == {name: tensor.data_ptr() for name, tensor in given.items()}
    assert (run["step"], run["stage"], run["cursor"], run["note"]) == (100, 1, [3, {"epoch": 2}], "ä")
    assert run["torch"] == torch.__version__ and run["schema"] == 1
    assert run == read_meta(path)
    assert shapes(path) == {name: (saved[name].shape, saved[name].dtype) for name in sorted(saved)}


def test_the_folder_names_no_machine_path_and_no_temporary_is_left(tmp_path):
    path = save(tmp_path, 1, tensors(), {})
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert sorted(contents(path)) == [".metadata", "__0_0.distcp", "run.json"]
    assert all(str(tmp_path).encode() not in data for data in contents(path).values())


def test_a_complete_step_is_never_written_again(tmp_path):
    path = save(tmp_path, 5, tensors(0), {"cursor": 1})
    before = contents(path)
    assert save(tmp_path, 5, tensors(1), {"cursor": 2}) == path
    assert contents(path) == before


def test_an_incomplete_folder_under_a_step_name_is_replaced(tmp_path):
    path = save(tmp_path, 5, tensors(0), {})
    (path / INDEX).unlink()
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load(path, tensors())
    save(tmp_path, 5, tensors(1), {})
    given = blank(tensors())
    load(path, given)
    assert_same(given, tensors(1))


def test_latest_goes_by_number_and_skips_what_is_incomplete(tmp_path):
    assert latest(tmp_path / "absent") is None and steps(tmp_path) == {}
    for step in (100_000_000, 9, 20):
        save(tmp_path, step, {"a": torch.zeros(1)}, {})
    (tmp_path / ".tmp-step-00000500").mkdir()
    (tmp_path / "step-00000600").mkdir()
    shutil.copytree(tmp_path / "step-00000020", tmp_path / "step-00000020-copy")
    assert list(steps(tmp_path)) == [9, 20, 100_000_000]
    assert latest(tmp_path) == tmp_path / "step-100000000"


def test_clean_removes_leftovers_only(tmp_path):
    save(tmp_path, 1, {"a": torch.zeros(1)}, {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".tmp-step-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".trash-step-00000000")
    (tmp_path / "notes").mkdir()
    clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step-00000001"]
    clean(tmp_path / "absent")


def test_retention_keeps_the_last_and_the_multiples(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, {"a": torch.tensor(step)}, {}, keep_last=2, keep_every=4)
        expected = [at for at in range(1, step + 1) if at > step - 2 or at % 4 == 0]
        assert list(steps(tmp_path)) == expected
    prune(tmp_path, keep_last=1)
    assert os.listdir(tmp_path) == ["step-00000011"]


def test_nothing_is_deleted_when_the_new_checkpoint_fails(tmp_path):
    save(tmp_path, 1, {"a": torch.zeros(1)}, {})
    with pytest.raises(TypeError):
        save(tmp_path, 2, {"a": torch.zeros(1), "b": Unsavable()}, {}, keep_last=1)  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == ["step-00000001"]


class Unsavable:
    def __reduce__(self):
        raise TypeError("not to be pickled")


def test_drop_after_makes_way_for_another_history(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, {"a": torch.tensor(step)}, {})
    drop_after(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given | {"extra": torch.zeros(2)}, "lacks the tensor 'extra'; it holds 8"),
        (lambda given: {k: v for k, v in given.items() if k != "flags"}, "holds the tensor 'flags', which this run"),
        (lambda given: given | {"view": torch.zeros(4)}, r"'view' has shape \(3,\), this run needs \(4,\)"),
        (lambda given: given | {"view": torch.zeros(3).half()}, "'view' has dtype torch.float32, this run needs"),
        (lambda given: given | {"view": torch.zeros(9), "empty": torch.zeros(1)}, "'empty' has shape"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named_and_nothing_is_read(tmp_path, change, message):
    path = save(tmp_path, 1, tensors(), {})
    given = change(blank(tensors()))
    before = {name: tensor.clone() for name, tensor in given.items()}
    with pytest.raises(ValueError, match=message) as caught:
        load(path, given)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, CheckpointError)
    assert_same(given, before)


def test_a_part_may_be_read(tmp_path):
    path = save(tmp_path, 1, tensors(), {})
    given = {"view": torch.zeros(3)}
    load(path, given, partial=True)
    assert torch.equal(given["view"], tensors()["view"])
    with pytest.raises(ValueError, match="lacks the tensor 'b'"):
        load(path, {"b": torch.zeros(1)}, partial=True)


@pytest.mark.parametrize(
    ("step", "meta", "rule", "message"),
    [
        (-1, {}, {}, "step=-1"),
        (1, {"files": 1}, {}, "files=1 is taken"),
        (1, {"step": 2}, {}, "step=2 is taken"),
        (1, {"cursor": float("nan")}, {}, "JSON values only"),
        (1, {"cursor": object()}, {}, "JSON values only"),
        (1, {}, {"keep_last": 0}, "keep_last=0 must be at least 1"),
        (1, {}, {"keep_last": 1, "keep_every": 0}, "keep_every=0 must be at least 1"),
    ],
)
def test_what_cannot_be_saved_is_said_before_anything_is_written(tmp_path, step, meta, rule, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path, step, {"a": torch.zeros(1)}, meta, **rule)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json"])
@pytest.mark.parametrize("how", ["delete", "empty", "cut", "longer", "flip"])
def test_damage_to_any_file_is_refused_in_one_line_and_nothing_is_read(tmp_path, name, how):
    path = save(tmp_path, 3, tensors(), {"cursor": 12345})
    file = path / name
    data = file.read_bytes()
    for at in (1, len(data) // 3, len(data) - 2):
        changed = bytes([data[at] ^ 1])
        damaged = {"empty": b"", "cut": data[:at], "longer": data + b"\0", "flip": data[:at] + changed + data[at + 1 :]}
        if how == "delete":
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(damaged[how])
        given = blank(tensors())
        with pytest.raises(CheckpointError) as caught:
            load(path, given)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert_same(given, blank(tensors()))


def test_a_newer_schema_asks_for_a_newer_version(tmp_path):
    path = save(tmp_path, 1, {"a": torch.zeros(1)}, {})
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | {"schema": 2}))
    with pytest.raises(ValueError, match="schema 2, known is up to 1: use a newer loopwise"):
        load(path, {"a": torch.zeros(1)})


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_an_index_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / INDEX).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="mkdir is no part of an index"):
        read_index(tmp_path)
    assert not (tmp_path / "attacked").exists()
    (tmp_path / INDEX).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="holds a dict"):
        read_index(tmp_path)


def in_child(act, *args) -> int:
    """Exit code of a child that runs `act`: 0 when it returns, 1 when it raises."""
    child = FORK.Process(target=act, args=args)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def fill_the_disk(folder: Path, limit: int) -> None:
    """Save where no file may grow past `limit` bytes, as on a full disk, then go on with the limit lifted."""
    torch.set_num_threads(1)
    before = contents(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        save(folder, 2, tensors(1), {}, keep_last=1)
    assert isinstance(caught.value, OSError) and isinstance(caught.value, ValueError)
    text = str(caught.value)
    assert str(folder / "step-00000002") in text and "File too large" in text and "\n" not in text
    assert contents(folder) == before and os.listdir(folder) == ["step-00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    given = blank(tensors())
    load(latest(folder), given)  # type: ignore[arg-type]
    assert_same(given, tensors(0))
    save(folder, 2, tensors(1), {}, keep_last=1)
    assert os.listdir(folder) == ["step-00000002"]


@pytest.mark.parametrize("limit", [0, 100, 5_000])
def test_a_full_disk_leaves_the_previous_checkpoint_and_training_goes_on(tmp_path, limit):
    path = save(tmp_path, 1, tensors(0), {})
    assert (path / "__0_0.distcp").stat().st_size > 5_000
    assert in_child(fill_the_disk, tmp_path, limit) == 0


@pytest.mark.parametrize("name", [INDEX, "run.json"])
def test_a_disk_that_fills_at_the_last_file_leaves_nothing_either(tmp_path, name, monkeypatch):
    """The small files come last; a folder in the place of one of them refuses the write as the disk would."""
    save(tmp_path, 1, tensors(0), {})
    write = checkpoints.Writer.write_data

    def in_the_way(self, plan, planner):
        done = write(self, plan, planner)
        (Path(self.path) / {INDEX: ".metadata.tmp"}.get(name, name)).mkdir()
        return done

    monkeypatch.setattr(checkpoints.Writer, "write_data", in_the_way)
    with pytest.raises(CheckpointError, match="cannot write checkpoint .*step-00000002: Is a directory"):
        save(tmp_path, 2, tensors(1), {})
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_an_interrupt_while_saving_is_an_interrupt_and_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(self, plan, planner):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoints.Writer, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, tensors(), {})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(CheckpointError, match="taken/step-00000001"):
        save(tmp_path / "taken", 1, tensors(), {})


def test_discard_takes_a_folder_away_at_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x")
    (tmp_path / ".trash-a").mkdir()
    discard(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ranks(act, folder: Path, size: int = 2) -> None:
    """Run `act(rank, folder)` on gloo ranks, each in a process; all must return."""
    port = free_port()
    children = [FORK.Process(target=rank_main, args=(act, rank, size, port, folder)) for rank in range(size)]
    for child in children:
        child.start()
    until = time.monotonic() + 60
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * size


def rank_main(act, rank: int, size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    act(rank, folder)
    dist.destroy_process_group()


def sharded(whole: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """Rows over ranks (6 rows, or 3: not divisible by 2), a replica, and plain tensors."""
    mesh = init_device_mesh("cpu", (size,))
    split = {name: distribute_tensor(whole[name], mesh, [Shard(0)]) for name in ("model/layers.0.weight", "model/half")}
    copied = {"view": distribute_tensor(whole["view"], mesh, [Replicate()])}
    return whole | split | copied


def gathered(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in parts.items()}


def save_and_load_sharded(rank: int, folder: Path) -> None:
    path = save(folder, 1, sharded(tensors(), 2), {"cursor": 4})
    given = sharded(blank(tensors()), 2)
    assert load(path, given)["cursor"] == 4
    assert_same(gathered(given), tensors())
    save(folder, 2, sharded(tensors(1), 2), {}, keep_last=1)
    assert list(steps(folder)) == [2]
    # one written by a single process, read by two
    given = sharded(blank(tensors()), 2)
    load(folder / "single" / "step-00000001", given)
    assert_same(gathered(given), tensors(2))


def test_what_two_ranks_save_one_process_loads_and_the_reverse(tmp_path):
    save(tmp_path / "single", 1, tensors(2), {})
    ranks(save_and_load_sharded, tmp_path)
    given = blank(tensors())
    load(tmp_path / "step-00000002", given)
    assert_same(given, tensors(1))
    assert {"__0_0.distcp", "__1_0.distcp"} <= set(contents(tmp_path / "step-00000002"))
    assert sorted(os.listdir(tmp_path)) == ["single", "step-00000002"]


def failures_reach_all_ranks(rank: int, folder: Path) -> None:
    whole = sharded(tensors(), 2)
    save(folder, 1, whole, {})
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match="File too large"):
        save(folder, 2, whole, {})
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    assert os.listdir(folder) == ["step-00000001"]
    dist.barrier()
    if rank == 0:
        data = (folder / "step-00000001" / "__1_0.distcp").read_bytes()
        (folder / "step-00000001" / "__1_0.distcp").write_bytes(data[:-1])
    dist.barrier()
    with pytest.raises(CheckpointError, match="__1_0.distcp has"):
        load(folder / "step-00000001", whole)
    save(folder, 3, whole, {})
    with pytest.raises(ValueError, match="lacks the tensor 'only here'"):
        load(folder / "step-00000003", whole | ({"only here": torch.zeros(1)} if rank == 1 else {}))


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path):
    ranks(failures_reach_all_ranks, tmp_path)
