"""Corpora that are tokenised on first use: the standard library, and a person's files."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from loopwise.train.data import corpus
from loopwise.train.data.corpus import cache_folder, kept, stdlib_corpus, stdlib_files, text_corpus
from loopwise.train.data.documents import Reading
from loopwise.train.data.text import ShardsData, TextData


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOOPWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small folder laid out as a standard library."""
    files = {
        "os.py": "import sys\n",
        "json/decoder.py": "# decoder ü\n",
        "abc.py": "",
        "lib.c": "int x;",
        "_sysconfigdata__linux.py": "here = '/somewhere'",
        "test/test_os.py": "assert",
        "json/tests/a.py": "assert",
        "site-packages/other/a.py": "import os",
        "__pycache__/os.py": "x",
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "lib" / "latin.py").write_bytes(b"# caf\xe9\n")
    return tmp_path / "lib"


def test_only_sources_of_the_library_itself(library: Path) -> None:
    names = [path.relative_to(library).as_posix() for path in stdlib_files(library)]
    assert names == ["abc.py", "json/decoder.py", "latin.py", "os.py"]
    shards = stdlib_corpus(library)
    documents = [bytes(shards.document(n)[:-1].tolist()).decode() for n in range(shards.num_documents)]
    assert documents == ["# decoder ü\n", "import sys\n"], "empty files and other encodings are left out"


def test_a_changed_library_is_another_corpus(library: Path, cache: Path) -> None:
    first = stdlib_corpus(library)
    assert stdlib_corpus(library).folder == first.folder
    (library / "os.py").write_text("import sys, io\n")
    second = stdlib_corpus(library)
    assert second.fingerprint != first.fingerprint and second.folder != first.folder
    assert {path.name for path in cache.iterdir()} == {first.folder.name, second.folder.name}


def test_a_library_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no source of the standard library: name a text with data.source"):
        stdlib_files(tmp_path)


def test_the_library_of_this_python_is_enough_to_train_on() -> None:
    files = stdlib_files()
    assert len(files) > 300 and sum(path.stat().st_size for path in files) > 5e6
    assert not any({"site-packages", "test"} & set(path.parts[-3:]) for path in files)


def test_processes_that_start_together_agree(library: Path, cache: Path) -> None:
    for number in range(200):
        (library / f"m{number}.py").write_text(f"x = {number}\n" * 50)
    fork = multiprocessing.get_context("fork")
    start, found = fork.Barrier(3), fork.SimpleQueue()

    def open_it() -> None:
        start.wait()
        found.put(stdlib_corpus(library).fingerprint)

    running = [fork.Process(target=open_it) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert {found.get() for _ in running} == {stdlib_corpus(library).fingerprint}
    assert len(list(cache.iterdir())) == 1, "no temporary folder is left"


def test_a_process_that_is_overtaken_uses_what_is_there(library: Path) -> None:
    files = stdlib_files(library)

    def overtaken(dst: Path) -> None:
        corpus.write(dst, corpus._sources(files), corpus.encoder())
        corpus.write(dst, corpus._sources(files), corpus.encoder())

    assert kept("name", overtaken).num_documents == 2


def test_own_files_are_tokenised_once_and_again_when_they_change(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one two three")
    first = text_corpus(str(path))
    made = (first.folder / "index.json").stat().st_mtime_ns
    assert (text_corpus(str(path)).folder / "index.json").stat().st_mtime_ns == made
    path.write_text("one two four!")
    second = text_corpus(str(path))
    assert second.fingerprint != first.fingerprint
    os.utime(path, ns=(1, 1))
    assert text_corpus(str(path)).fingerprint == second.fingerprint, "touched, but the same text"
    assert text_corpus(str(path), reading=Reading(per="line")).folder != second.folder


def test_the_config_opens_files_and_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a text of some length, " * 20)
    source = TextData(source=str(path), length=16).open(seed=0)
    assert source.num_rows() > 10 and source.num_rows("valid") == 1
    assert source.batch(0, 4).num_tokens == 64
    with pytest.raises(ValueError, match="data.text: the corpus has 461 tokens, rows of length 256 need 771"):
        TextData(source=str(path)).open(seed=0)
    with pytest.raises(ValueError, match="b.txt does not exist"):
        TextData(source=str(tmp_path / "b.txt")).open(seed=0)
    with pytest.raises(ValueError, match="tokenizer"):
        TextData(tokenizer="other").open(seed=0)
    with pytest.raises(ValueError, match="held_out=0.5 must be at least 0 and below 0.5"):
        TextData(held_out=0.5)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        ShardsData(folder="x", length=0)
    with pytest.raises(ValueError, match="x holds no token shards"):
        ShardsData(folder="x").open(seed=0)


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LOOPWISE_CACHE", str(tmp_path / "file"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="set LOOPWISE_CACHE to a folder"):
        text_corpus(str(tmp_path / "a.txt"))
    monkeypatch.delenv("LOOPWISE_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "loopwise"
