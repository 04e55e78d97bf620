"""The committed table of how models are batched is complete, is that of the page, and a sample of it holds again."""

from __future__ import annotations

import json

import pytest
from batching import MODES, PAGE, RESULTS, examine, names, with_table
from tiny import UNAVAILABLE

# depth-wise, told the time, a recurrent state, routers, several loops, nothing that writes text
SAMPLE = ["llama", "mixtral", "gemma3_text", "loopwise.load:huginn", "loopwise.load:loopformer", "mamba", "bloom"]
SAMPLE += ["loopwise.load:mor_token", "loopwise.load:hrm_text", "loopwise.load:albert", "deepseek_v32"]


@pytest.fixture(scope="module")
def rows():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_every_type_and_family_has_one_row(rows):
    assert [row["name"] for row in rows] == names()


def test_rows_say_why_and_what_was_seen(rows):
    for row in rows:
        assert row["mode"] in MODES, row["name"]
        assert bool(row["reason"]) == (row["mode"] != "depth-wise"), row["name"]
        want = {"depth-wise": "as alone", "plain": "as alone", "generate": "runs", "none": ""}[row["mode"]]
        assert row["shown"] == want, row["name"]
        assert not row["reason"].startswith("CRASH"), row["name"]
        if row["name"] in UNAVAILABLE:
            assert row["mode"] == "none"


def test_enough_models_are_batched_over_depth(rows):
    assert sum(row["mode"] == "depth-wise" for row in rows) >= 105


def test_the_page_shows_the_table(rows):
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, rows) == page


@pytest.mark.conformance
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_runs_as_the_table_says(rows, name):
    assert examine(name) == next(row for row in rows if row["name"] == name)
