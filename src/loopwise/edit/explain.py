"""An edit in words, and as a picture of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from loopwise.edit.maps import DepthEdit, NewLayer
from loopwise.io.amounts import amount
from loopwise.plan import Plan
from loopwise.plots import layers_picture, plan_text
from loopwise.plots.layers import Kind, NewBox

MAX_ROWS, MAX_JOINTS = 24, 4


def explain(
    edit: DepthEdit,
    *,
    title: str = "",
    mode: str | None = None,
    layer_params: Sequence[int] | None = None,
    other_params: int = 0,
) -> str:
    """What an edit does, in lines of text.

    Where every new layer comes from and which start as the identity, what is promised of the function and what speaks
    against it, the plan, visits and parameters before and after, and what is usually trained next.

    Args:
        edit: the edit.
        title: what to call it, such as the operator's text.
        mode: "alias", "tie" or "materialize", default that of the edit.
        layer_params: number of parameters of each old layer, where they are known.
        other_params: parameters outside the layers: embedding, final norm, head.

    Raises:
        ValueError: another number of `layer_params` than old layers, an unknown mode, or one that the edit has not.
    """
    mode, shown, before = _realised(edit, mode)
    lines = [f"{title or 'edit'}: {_layers(edit.num_layers)} -> {_layers(len(shown.layers))}, {_MODES[mode]}", ""]
    lines += [f"  {text}" for text in _rows(shown)]
    unused = sorted(set(range(edit.num_layers)) - {source for layer in shown.layers for source in layer.sources})
    if unused:
        lines.append(f"  old {_ranges(unused)} left out")
    lines += ["", *_wrapped("function", _function(edit))]
    lines += _wrapped("visits", [_visits(edit, shown)])
    if layer_params is not None:
        lines += _wrapped("parameters", [_parameters(edit, shown, layer_params, other_params)])
    for name, spec in shown.loops:
        lines += _wrapped("loop", [f"{name} has {', '.join(f'{axis}={_kind(what)}' for axis, what in spec.items())}"])
    lines += _wrapped("next", _next(edit, shown, mode))
    lines += ["", "plan before", *_indented(plan_text(before)), "plan after", *_indented(plan_text(shown.plan))]
    return "\n".join(lines)


def edit_picture(edit: DepthEdit, path: str | Path, *, title: str = "", mode: str | None = None) -> Path:
    """The layers before and after an edit as a PNG, see `plots.layers_picture`.

    Raises:
        ValueError: an unknown mode, or one that the edit has not.
        OSError: the file cannot be written.
    """
    _, shown, _ = _realised(edit, mode)
    boxes = [NewBox(sources=layer.sources, kind=_box_kind(layer)) for layer in shown.layers]
    return layers_picture(edit.num_layers, boxes, path, plan=shown.plan, title=title)


_MODES = {
    "alias": "the old tensors under another plan",
    "tie": "new tensors, shared between visits",
    "materialize": "new tensors, a layer for every visit",
}


def _realised(edit: DepthEdit, mode: str | None) -> tuple[str, DepthEdit, Plan]:
    """The mode, the edit as it shows in it, and the plan before."""
    mode = mode or edit.default
    if mode not in _MODES:
        raise ValueError(f"mode {mode!r} must be one of {', '.join(_MODES)}")
    if mode == "alias":
        own = tuple(NewLayer(sources=(layer,)) for layer in range(edit.num_layers))
        plan = edit.alias_plan()
        return mode, DepthEdit(before=edit.before, num_layers=edit.num_layers, plan=plan, layers=own), edit.before
    return mode, edit.unrolled() if mode == "materialize" else edit, edit.before


def _rows(edit: DepthEdit) -> Iterator[str]:
    """One line for every run of new layers that are made alike of old layers in a row."""
    runs: list[list[int]] = []
    for number, layer in enumerate(edit.layers):
        if runs and _continues(edit.layers[number - 1], layer):
            runs[-1].append(number)
        else:
            runs.append([number])
    names = [f"new {_ranges(run)}" for run in runs]
    width = max(map(len, names))
    for name, run in list(zip(names, runs, strict=True))[:MAX_ROWS]:
        yield f"{name:<{width}}  {_made(edit.layers[run[0]], edit.layers[run[-1]])}"
    if len(runs) > MAX_ROWS:
        yield f"... and {_layers(sum(map(len, runs[MAX_ROWS:])))} more in the same way"


def _continues(last: NewLayer, layer: NewLayer) -> bool:
    follows = tuple(source + 1 for source in last.sources) == layer.sources
    return follows and (last.zero, last.scale) == (layer.zero, layer.scale)


def _made(first: NewLayer, last: NewLayer) -> str:
    runs = [_ranges(range(start, end + 1)) for start, end in zip(first.sources, last.sources, strict=True)]
    if first is last and len(runs) > 1:
        runs = _ranges(first.sources).split(", ")
    if first.zero:
        what = f"old {' and '.join(runs)} with output projections at zero: starts as the identity"
    elif len(first.sources) > 1:
        what = f"mean of old {' and '.join(filter(None, [', '.join(runs[:-1]), runs[-1]]))}"
    else:
        what = f"old {runs[0]}"
    if not first.zero and first.scale:
        factors = ", ".join(f"{name or 'every tensor'} x{factor:g}" for name, factor in first.scale)
        what += f", {factors}"
    return what


def _function(edit: DepthEdit) -> list[str]:
    if edit.promise == "exact":
        return ["the old one, exactly"]
    if edit.promise == "tolerance":
        return ["the old one up to rounding: offsets of full rank give every visit its old layer back"]
    return ["another one, measure the jump before training; " + "; ".join(_reasons(edit))]


def _reasons(edit: DepthEdit) -> Iterator[str]:
    """What keeps the function from being the old one."""
    visits = [edit.layers[layer] for layer in edit.plan.layers]
    shared = sum(layer.sources != (origin,) for layer, origin in zip(visits, edit.origins, strict=True))
    if shared:
        rank = edit.relaxation.rank if edit.relaxation else None
        back = f", offsets of rank {rank} give back a part" if rank is not None else ""
        yield f"{shared} of {len(visits)} visits run with other tensors than their old layer's{back}"
    if any(layer.scale and not layer.zero and not layer.is_copy for layer in edit.layers):
        yield "tensors are scaled"
    joints = list(_joints(edit))
    if joints:
        more = f" and {len(joints) - MAX_JOINTS} more" if len(joints) > MAX_JOINTS else ""
        pairs = ", ".join(f"{a} -> {b}" for a, b in joints[:MAX_JOINTS])
        yield f"old layers that never met follow each other: {pairs}{more}"
    if not joints and not shared and edit.loops:
        yield "what the loop adds is no identity at the start"


def _joints(edit: DepthEdit) -> Iterator[tuple[str, str]]:
    """Neighbours among the visits, by their old layers, that are no neighbours in the old plan."""
    known = set(pairwise(["input", *edit.before.layers, "output"]))
    kept = [o for o, n in zip(edit.origins, edit.plan.layers, strict=True) if not edit.layers[n].zero]
    for first, second in pairwise(["input", *kept, "output"]):
        if (first, second) not in known:
            yield str(first), str(second)


def _visits(edit: DepthEdit, shown: DepthEdit) -> str:
    old, new = edit.before.num_slots, shown.plan.num_slots
    ratio = "as many" if old == new else f"x{new / old:.3g} the compute and the KV cache of layers"
    return f"{old} -> {new} per token, {ratio}"


def _parameters(edit: DepthEdit, shown: DepthEdit, layer_params: Sequence[int], other_params: int) -> str:
    if len(layer_params) != edit.num_layers:
        raise ValueError(f"layer_params has {len(layer_params)} numbers for {edit.num_layers} layers")
    old = sum(layer_params) + other_params
    new = sum(layer_params[layer.sources[0]] for layer in shown.layers) + other_params
    text = f"{amount(old)} -> {amount(new)} ({new / old - 1:+.1%})"
    return text + (", and the offsets of every visit" if shown.relaxation is not None else "")


def _next(edit: DepthEdit, shown: DepthEdit, mode: str) -> list[str]:
    zeroed = [number for number, layer in enumerate(shown.layers) if layer.zero]
    if zeroed:
        return [f"train the new layers alone ({_ranges(zeroed)}): loopwise uptrain DIR --method new_layers"]
    if shown.loops:
        return ["raise the number of passes while training: loopwise uptrain DIR --method retrofit"]
    if shown.relaxation is not None:
        return ["heal: loopwise uptrain DIR --method full; --method offsets leaves the shared layers as they are"]
    if edit.promise == "exact":
        return ["nothing is to heal; trained further, copies become different layers"]
    if mode == "alias":
        return ["may help as it is: loopwise score SRC and this plan, then keep what is better"]
    if len(shown.layers) < edit.num_layers:
        return ["heal: loopwise uptrain DIR --method full, or lora; --source SRC --distill 1 learns from the old model"]
    return ["go on pretraining; loss jumps first and falls faster than from scratch"]


def _box_kind(layer: NewLayer) -> Kind:
    if layer.zero:
        return "zero"
    if len(layer.sources) > 1:
        return "mean"
    return "copy" if layer.is_copy else "scaled"


def _kind(what: object) -> str:
    return str(what.get("kind", "")).partition(".")[2] if isinstance(what, dict) else str(what)


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3 and 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _wrapped(name: str, texts: Sequence[str]) -> list[str]:
    return [f"{name:<12}{text}" for text in texts]


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]
