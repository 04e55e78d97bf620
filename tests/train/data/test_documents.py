"""Documents out of files of every kind."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.train.data import documents as module
from loopwise.train.data.documents import Documents, Reading
from tests.train.data.corpora import law


def texts(sources: list[Any], **reading: Any) -> list[str]:
    """Documents with their pieces joined."""
    found = [""]
    for piece in Documents(sources, Reading(**reading)):
        assert piece.text
        found[-1] += piece.text
        if piece.ends:
            found.append("")
    assert found.pop() == "", "the last piece ends its document"
    return found


def test_a_file_is_a_document_and_keeps_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\nthree\rfour \xc3\xa9\n")
    assert texts([path]) == ["one\r\ntwo\n\nthree\rfour é\n"]


@law
@given(content=st.text(st.characters(codec="utf-8"), min_size=1, max_size=300), size=st.integers(1, 40))
def test_pieces_are_the_file_whatever_their_length(
    content: str, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", size)
        pieces = list(Documents([path]))
        assert "".join(piece.text for piece in pieces) == content.removeprefix("\ufeff")
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
        assert all(len(piece.text) <= 2 * size for piece in pieces)


def test_lines_and_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("one\ntwo\n \n\n\nthree\n", encoding="utf-8")
    assert texts([path], per="line") == ["one", "two", "three"]
    assert texts([path], per="paragraph") == ["one\ntwo\n", "three\n"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\n", "n": 1}, {"text": ""}, {"text": None}, {"text": "zwei ü"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert texts([path]) == ["one\n", "zwei ü"]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("{", "text", "a.jsonl line 2 is not a JSON object"),
        ("[1]", "text", "a.jsonl line 2 is not a JSON object"),
        ('{"text": "x"}', "texts", "a.jsonl line 1 has no field 'texts'; did you mean 'text'"),
        ('{"text": 3}', "text", "document 2 is int, not a text"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, field: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        texts([tmp_path / "a.jsonl"], field=field)


def test_packed_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    assert texts([tmp_path]) == ["one\n", "two"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n" * 1000)[:-9])
    with pytest.raises(ValueError, match="a.txt.gz is not a whole gzip file"):
        texts([tmp_path])


def test_folders_are_read_in_the_order_of_paths(tmp_path: Path) -> None:
    for name in ("b/z.txt", "b.txt", "a/y.md", "a/x.jsonl", ".hidden/a.txt", "a/.b.txt", "a/c.bin", "a/d.c"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "j"}' if name.endswith("jsonl") else name, encoding="utf-8")
    assert texts([tmp_path]) == ["j", "a/y.md", "b/z.txt", "b.txt"]
    assert texts([tmp_path], pattern="*.c") == ["a/d.c"]
    assert texts([tmp_path / "b.txt", tmp_path / "b"]) == ["b.txt", "b/z.txt"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        texts([tmp_path / "a.txt"])
    with pytest.raises(ValueError, match="b.txt does not exist"):
        texts([tmp_path / "b.txt"])
    with pytest.raises(ValueError, match=r"has no file that matches \*\.c"):
        texts([tmp_path], pattern="*.c")
    with pytest.raises(ValueError, match="no source is given"):
        texts([])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"has no file that ends in \.txt"):
        texts([tmp_path / "folder"])


def test_progress_ends_at_one(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 50_000, encoding="utf-8")
    documents = Documents([tmp_path])
    shares = [documents.done for _ in documents]
    assert shares == sorted(shares) and shares[0] > 0
    assert documents.done == 1


@pytest.mark.parametrize(("name", "library"), [("a.parquet", "pyarrow"), ("saved", "datasets"), ("hf:x", "datasets")])
def test_an_absent_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str) -> None:
    def absent(wanted: str) -> Any:
        raise ImportError(wanted)

    monkeypatch.setattr(importlib, "import_module", absent)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"needs the package {library}: pip install 'loopwise\[data\]'"):
        texts([name if name.startswith("hf:") else tmp_path / name])


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"n": [1, 2, 3], "body": ["one", None, "three\n"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert texts([tmp_path], field="body") == ["one", "three\n"]
    with pytest.raises(ValueError, match="has no field 'text'; known: body, n"):
        texts([tmp_path])
    with pytest.raises(ValueError, match="document 1 is int"):
        texts([tmp_path], field="n")
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="a.parquet is not a parquet file"):
        texts([tmp_path])


def test_datasets_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "tiny": rows.select([1])}).save_to_disk(tmp_path / "both")
    assert texts([tmp_path / "one"]) == ["one", "two"]
    assert texts([tmp_path / "both"], split="tiny") == ["two"]
    with pytest.raises(ValueError, match="has no split 'tine'; did you mean 'tiny'"):
        texts([tmp_path / "both"], split="tine")
    with pytest.raises(ValueError, match="has no field 'texts'; did you mean 'text'"):
        texts([tmp_path / "one"], field="texts")
