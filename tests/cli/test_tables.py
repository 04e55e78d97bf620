"""`loopwise architectures`, `loopwise compose` and `loopwise families`."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from loopwise.cli.architectures import architectures
from loopwise.cli.compose import composition
from loopwise.cli.families import families

Run = Callable[..., tuple[int, str, str]]


def test_architecture_rows_are_complete() -> None:
    rows = architectures()
    names = [row["model_type"] for row in rows]
    assert names == sorted(set(names))
    assert {"llama", "qwen3", "t5"} & set(names)
    for row in rows:
        assert row["status"] in ("pass", "refused")
        assert isinstance(row["materializes"], bool)
        # Whatever does not run says why.
        assert row["reason"] or (row["status"] == "pass" and row["materializes"]), row


def test_architectures_json(run: Run) -> None:
    code, out, _ = run("architectures", "--json")
    assert code == 0
    assert json.loads(out) == architectures()


@pytest.mark.parametrize("status", ["pass", "refused"])
def test_architectures_by_status(run: Run, status: str) -> None:
    rows = json.loads(run("architectures", "--json", "--status", status)[1])
    assert rows == [row for row in architectures() if row["status"] == status]


def test_architectures_table(run: Run) -> None:
    code, out, _ = run("architectures")
    assert code == 0
    assert all(row["model_type"] in out for row in architectures())
    passing = sum(row["status"] == "pass" for row in architectures())
    assert f"{passing} loop" in out


def test_composition_has_every_pair_once_and_a_reason_for_every_refusal() -> None:
    rows = composition()
    pairs = [frozenset((row["first"], row["second"])) for row in rows]
    assert len(pairs) == len(set(pairs))
    names = {name for pair in pairs for name in pair}
    assert {frozenset((a, b)) for a in names for b in names if a < b} <= set(pairs)
    assert all(row["reason"] for row in rows if row["status"] == "refused")


def test_compose_prints_them_all(run: Run) -> None:
    code, out, _ = run("compose")
    assert code == 0
    for row in composition():
        assert row["first"] in out and row["second"] in out
        assert not row["reason"] or row["reason"].split()[0] in out


def test_compose_json(run: Run) -> None:
    assert json.loads(run("compose", "--json")[1]) == composition()


def test_family_rows_are_complete() -> None:
    rows = families()
    names = [(row["family"], row["checkpoint"]) for row in rows]
    assert names == sorted(set(names))
    for row in rows:
        assert 0 <= row["max_abs_diff"] <= row["atol"] <= 3e-5
        assert row["cached_equals_uncached"] in (True, None)
        assert row["plan"] and row["components"] and row["source"]


def test_families_json(run: Run) -> None:
    code, out, _ = run("families", "--json")
    assert code == 0
    assert json.loads(out) == families()


def test_families_table(run: Run) -> None:
    code, out, _ = run("families")
    assert code == 0
    assert all(row["family"] in out and row["plan"] in out for row in families())
