"""Files that are whole or absent."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from loopwise.io.atomic import write_text


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "eins\n")
    assert path.read_bytes() == b"eins\n"
    write_text(str(path), "zwei: \u00e4\u20ac\n")
    assert path.read_text(encoding="utf-8") == "zwei: \u00e4\u20ac\n"
    assert os.listdir(tmp_path) == ["note.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "note.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")  # a lone surrogate has no UTF-8 form
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_a_failure_leaves_no_new_file(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "new.txt", "\ud800")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        write_text(tmp_path / "absent" / "note.txt", "x")


def test_a_folder_is_not_replaced(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "taken", "x")
    assert sorted(os.listdir(tmp_path)) == ["taken"]


def test_a_reader_sees_the_old_or_the_new_text_only(tmp_path):
    path = tmp_path / "note.txt"
    texts = ["a" * 200_000, "b" * 200_000]
    write_text(path, texts[0])
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_text(encoding="utf-8"))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_text(path, texts[i % 2])
    stop.set()
    reader.join()
    assert seen <= set(texts) and seen
