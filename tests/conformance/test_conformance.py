"""The committed table of architectures is complete, and a sample of it holds when run again."""

from __future__ import annotations

import json

import pytest
from run import RESULTS, guarded
from tiny import MODEL_TYPES

# attention, ALiBi, recurrent state, a hybrid, one that loops but cannot be unrolled, one refused
SAMPLE = ["llama", "bloom", "mamba2", "qwen3_next", "deepseek_v3", "xlm"]


@pytest.fixture(scope="module")
def table():
    return {row["model_type"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))}


def test_every_type_of_the_causal_mapping_has_one_row(table):
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [row["model_type"] for row in rows] == list(MODEL_TYPES)
    assert len(table) == len(rows)


def test_rows_are_well_formed_and_say_why(table):
    for name, row in table.items():
        assert row["status"] in ("pass", "refused"), name
        assert isinstance(row["materializes"], bool) and isinstance(row["reason"], str), name
        if row["status"] == "refused" or not row["materializes"]:
            assert len(row["reason"]) > 10, f"{name} gives no reason"
        if row["status"] == "refused":
            assert not row["materializes"], f"{name} is refused, yet exported"
        else:
            assert not any(text.startswith("FAILS") for text in row["laws"].values()), name


def test_enough_types_pass(table):
    passing = [row for row in table.values() if row["status"] == "pass"]
    assert len(passing) >= 115
    assert sum(row["materializes"] for row in passing) >= 100


def test_no_type_crashes_the_suite(table):
    assert [name for name, row in table.items() if row["reason"].startswith("CRASH")] == []


def test_a_passing_type_was_held_to_every_law(table):
    laws = {"identity", "unrolling", "caching", "chunked_prefill", "left_padding", "loop_counts", "round_trip"}
    laws |= {"causality", "batch_independence", "deep_copy", "caching_odd_plan"}
    for name, row in table.items():
        if row["status"] == "pass":
            assert set(row["laws"]) == laws, name


@pytest.mark.conformance
@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample_runs_as_the_table_says(table, model_type):
    row, again = table[model_type], guarded(model_type)
    got = {key: again[key] for key in ("status", "materializes")}
    assert got == {key: row[key] for key in ("status", "materializes")}, again["reason"]
    assert set(again.get("laws", {})) == set(row.get("laws", {}))


def test_the_sample_is_diverse(table):
    seen = {(table[name]["status"], table[name]["materializes"]) for name in SAMPLE}
    assert seen == {("pass", True), ("pass", False), ("refused", False)}
