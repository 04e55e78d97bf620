"""Edits of other tools: the orders that their own code gives, the way back, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.edit.importers import Rys, operator_from, read_mergekit, read_stacking_list, to_mergekit, to_rys
from loopwise.edit.maps import DepthEdit, NewLayer
from loopwise.edit.operators import DepthOperator
from loopwise.edit.text import parse
from loopwise.plan import Plan


def edited(operator: object, num_layers: int) -> DepthEdit:
    assert isinstance(operator, DepthOperator)
    return operator.edit(Plan.identity(num_layers), num_layers)


def order(operator: object, num_layers: int) -> list[int]:
    return [layer.sources[0] for layer in edited(operator, num_layers).unrolled().layers]


def merge(tmp_path: Path, text: str) -> str:
    path = tmp_path / "merge.yml"
    path.write_text(text)
    return f"mergekit:{path}"


SOLAR = """
slices:
  - sources:
      - model: base
        layer_range: [0, 6]
  - sources:
      - {model: base, layer_range: [2, 8]}
merge_method: passthrough
"""
LLAMA_PRO = """
slices:
  - sources: [{model: base, layer_range: [0, 4]}]
  - sources:
      - model: base
        layer_range: [3, 4]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0}
            - value: 1.0
merge_method: passthrough
dtype: bfloat16
tokenizer_source: base
"""


def test_two_slices_are_solar(tmp_path: Path) -> None:
    assert order(operator_from(merge(tmp_path, SOLAR)), 8) == order(parse("solar(2)"), 8)


def test_llama_pro_written_as_scales_keeps_the_function(tmp_path: Path) -> None:
    operator = operator_from(merge(tmp_path, LLAMA_PRO), dtype="bfloat16")
    edit = edited(operator, 4)
    assert edit.layers == edited(parse("llama_pro(4)"), 4).layers
    assert edit.promise == "exact"
    made = read_mergekit(tmp_path / "merge.yml")
    assert (made.model, made.dtype) == ("base", "bfloat16")


def test_the_first_filter_that_fits_counts_and_levels_follow_each_other(tmp_path: Path) -> None:
    text = """
parameters: {scale: [{filter: v_proj, value: 3}, {filter: up_proj, value: 5}]}
slices:
  - sources: [{model: m, layer_range: [0, 1], parameters: {scale: [{filter: v_proj, value: 2}]}}]
    parameters: {scale: {filter: q_proj, value: 7}}
  - sources: [{model: m, layer_range: [1, 2]}]
merge_method: passthrough
"""
    layers = edited(operator_from(merge(tmp_path, text)), 2).layers
    assert layers[0].scale == (("v_proj", 2.0), ("q_proj", 7.0), ("v_proj", 3.0), ("up_proj", 5.0))
    assert layers[1].scale == (("v_proj", 3.0), ("up_proj", 5.0))


def test_a_list_of_numbers_is_spread_over_the_slice(tmp_path: Path) -> None:
    text = """
slices:
  - sources: [{model: m, layer_range: [0, 1]}]
  - sources: [{model: m, layer_range: [1, 6], parameters: {scale: [0, 1, 0.5]}}]
  - sources: [{model: m, layer_range: [6, 7]}]
merge_method: passthrough
"""
    layers = edited(operator_from(merge(tmp_path, text)), 7).layers
    assert [layer.scale for layer in layers[1:6]] == [(("", f),) for f in (0, 0.5)] + [()] + [
        (("", f),) for f in (0.75, 0.5)
    ]


def test_models_of_one_is_the_model(tmp_path: Path) -> None:
    operator = operator_from(merge(tmp_path, "models: [{model: m}]\nmerge_method: passthrough\n"))
    assert edited(operator, 3).is_same


def naive_rys(num_layers: int, blocks: list[tuple[int, int]]) -> list[int]:
    """(i, j) = 0..j-1, i..N-1; further blocks go behind the last j-1."""
    (i, j), *rest = blocks
    visits = [*range(j), *range(i, num_layers)]
    for i, j in rest:
        cut = max(at for at, layer in enumerate(visits) if layer == j - 1) + 1
        visits = visits[:cut] + list(range(i, j)) + visits[cut:]
    return visits


blocks_of_12 = st.lists(
    st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda pair: pair[0] < pair[1]), min_size=1, max_size=4
)


@given(blocks_of_12)
def test_blocks_are_those_of_rys(blocks: list[tuple[int, int]]) -> None:
    spec = "blocks:" + ";".join(f"{i},{j}" for i, j in blocks)
    assert order(operator_from(f"rys:{spec}"), 12) == naive_rys(12, blocks)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("(1,3)", [0, 1, 2, 1, 2, 3]),
        ("1,3", [0, 1, 2, 1, 2, 3]),
        ("(0,0)", [0, 1, 2, 3]),
        ("layers:0,1,1,3", [0, 1, 1, 3]),
        ("layers:0,1,2,3" + ",2" * 200, [0, 1, 2, 3] + [2] * 200),
        ("layers: 0-2, 1-3", [0, 1, 2, 1, 2, 3]),
        ("blocks:(0,2);(1,4)", [0, 1, 0, 1, 2, 3, 1, 2, 3]),
    ],
)
def test_layer_specs(spec: str, expected: list[int]) -> None:
    operator = operator_from(f"rys:{spec}")
    assert order(operator, 4) == expected
    assert isinstance(operator, Rys) and parse(operator.text()) == operator


def test_layers_that_a_spec_leaves_out_go() -> None:
    edit = edited(operator_from("rys:layers:0,2,2,3"), 4)
    assert (len(edit.layers), str(edit.plan)) == (3, "0-1 1-2")


@pytest.mark.parametrize(
    "text", ["layers:0,1,1", '{"layers": [0, 1, 1]}', '{"key": "(1,2)", "score": 3}', "# best\n1,2"]
)
def test_specs_in_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "spec"
    path.write_text(text)
    assert order(operator_from(f"rys:{path}"), 2) == [0, 1, 1]


def test_stacking_lists(tmp_path: Path) -> None:
    path = tmp_path / "stack.json"
    path.write_text('{"src_config_name": "2L", "stacking_list": [0, 1, 0, 1], "layer_name": "h"}')
    assert order(operator_from(f"stacking:{path}"), 2) == order(parse("stack(2)"), 2)
    path.write_text('{"stacking_lst": [0]}')
    with pytest.raises(ValueError, match="did you mean 'stacking_list'"):
        read_stacking_list(path)


new_layers = st.builds(
    lambda source, zero, scale: NewLayer(sources=(source,), zero=zero, scale=() if zero else scale),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([(), (("o_proj", 0.5),), (("q_proj", 2.0), ("k_proj", 0.0)), (("up_proj", 3.0), ("", 0.25))]),
)


@given(st.lists(new_layers, max_size=12))
def test_merges_come_back(inner: list[NewLayer]) -> None:
    import yaml

    from loopwise.edit.passthrough import from_mergekit

    layers = (NewLayer(sources=(0,)), *inner, NewLayer(sources=(5,)))
    edit = DepthEdit(before=Plan.identity(6), num_layers=6, plan=Plan.identity(len(layers)), layers=layers)
    text = to_mergekit(edit, "base", dtype="float16")
    made = from_mergekit(yaml.safe_load(text))
    back = edited(made.operator, 6)
    assert made.dtype == "float16"
    for old, new in zip(layers, back.layers, strict=True):
        assert (new.sources, new.zero) == (old.sources, old.zero)
        for name in ("a.o_proj.weight", "q_proj", "k_proj", "up_proj", "norm"):
            assert factor(new, name) == factor(old, name)


def factor(layer: NewLayer, name: str) -> float:
    return next((value for part, value in layer.scale if part in name), 1.0)


@given(blocks_of_12)
def test_specs_come_back(blocks: list[tuple[int, int]]) -> None:
    edit = edited(Rys(spec=";".join(f"({i},{j})" for i, j in blocks)), 12)
    spec = to_rys(edit)
    assert order(Rys(spec=spec), 12) == [layer.sources[0] for layer in edit.unrolled().layers]


def test_edits_that_have_no_such_form_are_refused() -> None:
    for text in ("recursive(2, cycle, average)", "recursive(2, cycle, rank=2)", "retrofit(1, 1, 1)"):
        edit = edited(parse(text), 4)
        for write in (to_rys, lambda edit: to_mergekit(edit, "m")):
            with pytest.raises(ValueError):
                write(edit)
    with pytest.raises(ValueError, match="makes new tensors"):
        to_rys(edited(parse("llama_pro(2)"), 4))


def with_slice(item: str, more: str = "") -> str:
    keep = "{sources: [{model: m, layer_range: [0, 2]}]}"
    return f"merge_method: passthrough\n{more}\nslices:\n  - {keep}\n  - {item}\n  - {keep}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: slerp\nslices: []", "'slerp' mixes models"),
        ("[1]", "mapping"),
        ("{a: [", "no YAML"),
        (with_slice("{sources: [{model: n, layer_range: [0, 1]}]}"), "'m' and 'n', an edit has one model"),
        (with_slice("{sources: [{model: m, layer_range: [2, 2]}]}"), r"slice 1: layer_range \[2, 2\] is empty"),
        (with_slice("{sources: [{model: m, layer_range: 3}]}"), r"must be \[first, end\]"),
        (with_slice("{sources: [{model: m}]}"), r"must be \[first, end\], got None"),
        (with_slice("{sources: []}"), "list of mappings"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1]}, {model: m, layer_range: [0, 1]}]}"), "takes one"),
        (with_slice("{sources: [{model: m+lora, layer_range: [0, 1]}]}"), "adapter"),
        (with_slice("{sources: [{model: m, layer_rang: [0, 1]}]}"), "did you mean 'layer_range'"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1], parameters: {weight: 1}}]}"), "key 'weight'"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1], parameters: {scale: half}}]}"), "must be a number"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1]}]}", "base_model: n"), "base_model 'n'"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1]}]}", "chat_template: chatml"), "chat_template"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1]}]}", "int8_mask: true"), "unknown key 'int8_mask'"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1]}]}", "parameters: {scale: 2}"), "embed_tokens"),
        (with_slice("{sources: [{model: m, layer_range: [0, 1]}]}", "dtype: float16"), "asks for dtype float16"),
        ("merge_method: passthrough\nmodels: [{model: m}]\nslices: [{sources: []}]", "exactly one of"),
        ("merge_method: passthrough\nmodels: [{model: m}, {model: n}]", "takes one"),
        ("merge_method: passthrough\nmodules: {}", "several modules"),
    ],
)
def test_merges_that_are_no_edit_say_why(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        operator_from(merge(tmp_path, text), dtype="bfloat16")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rys:", "is no layer spec"),
        ("rys:layers:", "where a layer or a range"),
        ("rys:layers:3-1", "empty"),
        ("rys:blok:1,2", "is no layer spec"),
        ("rys:3,1", "empty"),
        ("rys:0,1,2", "is no layer spec"),
        ("rys:2,9", "up to layer 8 of 4"),
        ("rys:layers:0,9", "names layer 9"),
        ("ris:1,2", "did you mean 'rys'"),
        ("mergekit:nowhere.yml", "nowhere.yml: No such file"),
        ("stacking:nowhere.json", "nowhere.json: No such file"),
        ("stak(2)", "did you mean 'stack'"),
    ],
)
def test_bad_texts_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        edited(operator_from(text), 4)
    assert "\n" not in str(caught.value)
