"""Safetensors as byte ranges: headers against the library that defines them, damage, copies between files."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loopwise.io.tensors import INDEX, SINGLE, copy_range, header_bytes, read_checkpoint, read_file

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.weight": torch.arange(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "flag": torch.tensor([True, False, True]),
}


def checkpoint(folder: Path) -> Path:
    """Two files and their index."""
    folder.mkdir()
    halves = {"one.safetensors": ["a.weight", "flag"], "two.safetensors": ["b.weight", "empty", "scalar"]}
    for file, names in halves.items():
        save_file({name: TENSORS[name] for name in names}, folder / file, {"format": "pt"})
    where = {name: file for file, names in halves.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}), encoding="utf-8")
    return folder


def test_the_header_says_where_the_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file(TENSORS, path, {"format": "pt", "made": "by hand"})
    file = read_file(path)
    raw = path.read_bytes()
    assert file.metadata == {"format": "pt", "made": "by hand"}
    assert file.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        found = file.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert raw[found.start : found.stop] == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_a_header_of_ours_is_read_by_the_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "source")
    file = read_file(tmp_path / "source")
    raw = (tmp_path / "source").read_bytes()
    ordered = sorted(file.tensors.items(), key=lambda item: -item[1].bits)
    body = b"".join(raw[tensor.start : tensor.stop] for _, tensor in ordered)
    (tmp_path / "copy").write_bytes(header_bytes(ordered, {"format": "pt"}) + body)
    loaded = load_file(tmp_path / "copy")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_a_sharded_folder_is_the_sum_of_its_files(tmp_path: Path) -> None:
    found = read_checkpoint(checkpoint(tmp_path / "model"))
    assert found.is_sharded and found.tensors.keys() == TENSORS.keys()
    assert found.tensors["b.weight"].file == "two.safetensors"
    assert found.changed() is None
    os.utime(tmp_path / "model" / "one.safetensors", ns=(1, 1))
    assert found.changed() == "one.safetensors"


def cut(folder: Path) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def grow(folder: Path) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def cut_header(folder: Path) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def scramble(folder: Path) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 40 + path.read_bytes()[48:])


def swap_offsets(folder: Path) -> None:
    path = folder / "two.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["b.weight"]["shape"] = [2, 2]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def rename_in_index(folder: Path) -> None:
    text = (folder / INDEX).read_text(encoding="utf-8")
    (folder / INDEX).write_text(text.replace("a.weight", "c.weight"), encoding="utf-8")


def forget_in_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    del index["weight_map"]["flag"]
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def leave_the_folder(folder: Path) -> None:
    text = (folder / INDEX).read_text(encoding="utf-8")
    (folder / INDEX).write_text(text.replace("one.safetensors", "../one.safetensors"), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "two.safetensors is truncated: its header names"),
        (grow, "has bytes that no tensor names"),
        (cut_header, "two.safetensors is truncated: its header has"),
        (scramble, "its header cannot be read"),
        (swap_offsets, "the bytes of b.weight are not where they should be"),
        (rename_in_index, "says that c.weight is in one.safetensors, which does not hold it"),
        (forget_in_index, "one.safetensors holds flag, which the index does not say"),
        (leave_the_folder, "is not a file beside it"),
        (lambda folder: (folder / "one.safetensors").unlink(), "the checkpoint is incomplete"),
        (lambda folder: (folder / "one.safetensors").write_bytes(b"x"), "its first bytes are no length"),
        (lambda folder: (folder / INDEX).write_text("{"), "is not JSON"),
        (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = checkpoint(tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="save_pretrained, which writes safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        read_checkpoint(tmp_path)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(min_size=1, max_size=200), cuts=st.tuples(st.integers(0, 199), st.integers(0, 199)))
def test_a_range_is_copied_where_it_should_be(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: tuple[int, int]
) -> None:
    start, stop = sorted(cut % (len(data) + 1) for cut in cuts)
    folder = tmp_path_factory.mktemp("copy")
    (folder / "source").write_bytes(data)
    (folder / "target").write_bytes(b"." * 7)
    source, target = os.open(folder / "source", os.O_RDONLY), os.open(folder / "target", os.O_WRONLY)
    try:
        copy_range(source, target, start, 3, stop - start)
        with pytest.raises(ValueError, match="has become shorter"):
            copy_range(source, target, start, 3, len(data) - start + 1)
    finally:
        os.close(source)
        os.close(target)
    assert (folder / "target").read_bytes()[3:].startswith(data[start:stop])
    assert (folder / "target").read_bytes()[:3] == b"..."


def test_a_range_is_copied_between_file_systems(tmp_path: Path) -> None:
    """There the kernel refuses to copy, and a buffer takes over."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    data = os.urandom(3 << 20)
    with tempfile.NamedTemporaryFile(dir=memory) as source, open(tmp_path / "target", "wb") as target:
        source.write(data)
        source.flush()
        copy_range(source.fileno(), target.fileno(), 1, 2, len(data) - 1)
        with pytest.raises(ValueError, match="has become shorter"):
            copy_range(source.fileno(), target.fileno(), 1, 2, len(data))
    assert (tmp_path / "target").read_bytes()[2:] == data[1:]
