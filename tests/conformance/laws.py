"""The laws of the library as functions of a tiny model: each raises `AssertionError` with the measured number when the
law does not hold.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import loopwise
from loopwise.models.hub import layer_list, text_config

NEW_TOKENS = 8
TOLERANCE = 1e-5  # times the largest logit: attention kernels differ by a few 1e-7 with shape


def looping_plan(num_layers: int) -> str:
    """Prelude, a looped core that holds every block pattern of the tiny configurations, coda."""
    if num_layers == 1:
        return "core:(0)x2"
    if num_layers == 2:
        return "0 core:(1)x2"
    return f"0 core:(1-{num_layers - 2})x2 {num_layers - 1}"


def odd_plan(num_layers: int) -> str:
    """Overlapping visits, a nested loop, the last layer before the first."""
    last = num_layers - 1
    return f"{last} 0-{last} a:(b:(0-{last // 2})x2 {last})x2"


def difference(got: torch.Tensor, want: torch.Tensor, what: str) -> float:
    """Largest difference over the largest value; shapes and places of infinities must agree."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} against {tuple(want.shape)}"
    finite = torch.isfinite(want)
    assert torch.equal(finite, torch.isfinite(got)), f"{what}: not finite at other places"
    if not finite.any():
        return 0.0
    return (got[finite] - want[finite]).abs().max().item() / max(want[finite].abs().max().item(), 1e-30)


def assert_close(got: torch.Tensor, want: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Two results agree up to `tolerance` times the largest value."""
    error = difference(got, want, what)
    assert error <= tolerance, f"{what}: relative difference {error:.2g}"


def as_good_as(measure: Callable[[nn.Module], float], looped: nn.Module, bare: nn.Module, what: str) -> str:
    """Accept an error within tolerance, in float32 or else in float64, or one that the model without loopwise has too.

    Args:
        measure: the relative error of a model.
        looped: the model with its plan.
        bare: the model without one.
        what: what is measured, for the message.

    Returns:
        How it was accepted.
    """
    error = measure(looped)
    if error <= TOLERANCE:
        return "holds"
    own = measure(bare)
    visits_per_layer = loopwise.plan_of(looped).num_slots / len(layer_list(looped).layers)
    if error <= 10 * own * visits_per_layer:  # rounding grows with every visit
        return f"as plain transformers, which differs by {own:.1g} itself"
    with contextlib.suppress(Exception):  # some architectures do not run in float64
        if measure(copy.deepcopy(looped).double()) <= TOLERANCE:
            return f"holds in float64; kernels in float32 leave {error:.1g}"
    raise AssertionError(f"{what}: relative difference {error:.2g}, without loopwise {own:.2g}")


def identity(model: PreTrainedModel, ids_BT: torch.Tensor) -> None:
    """Law 1: under the identity plan logits, gradients and generations are bit for bit those without a plan."""
    want = identity_reference(model, ids_BT)
    loopwise.attach(model, f"0-{len(layer_list(model).layers) - 1}")
    try:
        got = identity_reference(model, ids_BT)
    finally:
        loopwise.detach(model)
    assert torch.equal(want[0], got[0]), "identity: logits differ"
    assert all(torch.equal(a, b) for a, b in zip(want[1], got[1], strict=True)), "identity: gradients differ"
    assert torch.equal(want[2], got[2]), "identity: generations differ"


def identity_reference(model: PreTrainedModel, ids_BT: torch.Tensor) -> tuple:
    """Logits, gradients and a generation of a model as it is."""
    return _logits(model, ids_BT), _gradients(model, ids_BT), _generate(model, ids_BT)


def unrolling(looped: PreTrainedModel, plain: PreTrainedModel, sources: Sequence[int], ids_BT: torch.Tensor) -> None:
    """Law 2: a plan equals the model whose layers were copied in visit order; a looped layer's gradient is the sum over
    its copies.

    Layer n of `plain` is a copy of layer `sources[n]`.
    """
    assert_close(_logits(looped, ids_BT, use_cache=False), _logits(plain, ids_BT, use_cache=False), "unrolled logits")
    _gradients(looped, ids_BT), _gradients(plain, ids_BT)
    path = layer_list(plain).path
    of_looped = dict(looped.named_parameters(remove_duplicate=False))
    sums: dict[torch.Tensor, torch.Tensor] = {}
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            continue
        if name.startswith(f"{path}."):
            index, _, rest = name.removeprefix(f"{path}.").partition(".")
            name = f"{path}.{sources[int(index)]}.{rest}"
        source = of_looped[name]
        sums[source] = sums.get(source, torch.zeros(())) + parameter.grad
    for name, parameter in looped.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, sums[parameter], f"gradient of {name}", 1e-4)
    looped.zero_grad()
    plain.zero_grad()


def unrolling_by_oracle(looped: PreTrainedModel, bare: PreTrainedModel, ids_BT: torch.Tensor) -> str:
    """Law 2 for a model that cannot be materialised: against patched copies, or else against replayed layers."""
    plan = loopwise.plan_of(looped)
    twin = copied(bare, plan)
    try:
        _logits(twin, ids_BT, use_cache=False)
    except Exception:  # the architecture looks things up by layer number
        unrolling(looped, replayed(bare, plan), range(len(layer_list(bare).layers)), ids_BT)
        return "holds against replayed layers"
    unrolling(looped, twin, plan.layers, ids_BT)
    return "holds against copied layers"


def replayed(model: PreTrainedModel, plan: loopwise.Plan) -> PreTrainedModel:
    """A copy in which the loop's last layer runs the body once more: an oracle for one loop of two iterations."""
    twin = copy.deepcopy(model)
    layers = layer_list(twin).layers
    body = [slot.layer for slot in plan.slots if slot.iterations == (0,)]
    calls: dict[int, tuple[tuple, dict]] = {}
    busy: list[bool] = []

    def keep(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(index, (args, kwargs))

        return hook

    def again(layer: nn.Module, args: tuple, output: object) -> object:
        if busy:
            return None
        busy.append(True)
        try:
            for i in body:
                args, kwargs = calls.pop(i)
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                output = (
                    layers[i](hidden, *args[1:], **kwargs)
                    if args
                    else layers[i](**(kwargs | {"hidden_states": hidden}))
                )
        finally:
            busy.clear()
            calls.clear()
        return output

    for i in body:
        layers[i].register_forward_pre_hook(keep(i), with_kwargs=True)
    layers[body[-1]].register_forward_hook(again)
    return twin


def copied(model: PreTrainedModel, plan: loopwise.Plan) -> PreTrainedModel:
    """A patched copy whose layer list holds copies in visit order: an oracle for the forward without a cache."""
    twin = copy.deepcopy(model)
    found = layer_list(twin)
    num_layers = len(found.layers)
    found.owner._modules[found.name] = nn.ModuleList(copy.deepcopy(found.layers[i]) for i in plan.layers)
    for module in twin.modules():
        inner = getattr(module, "config", None)
        inner = inner.get_text_config(decoder=True) if inner is not None and hasattr(inner, "get_text_config") else None
        if inner is None or inner.__dict__.get("_unrolled"):
            continue
        for key, value in list(inner.__dict__.items()):
            if isinstance(value, (list, tuple)) and len(value) == num_layers and key != "architectures":
                inner.__dict__[key] = [value[i] for i in plan.layers]
            elif value == num_layers and key in _COUNTS:
                inner.__dict__[key] = plan.num_slots
        inner.__dict__["_unrolled"] = True
    return twin


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def caching(looped: PreTrainedModel, plain: PreTrainedModel | None, bare: PreTrainedModel, ids_BT: torch.Tensor) -> str:
    """Law 3: cached generation equals full recomputation, or, where plain transformers itself does not, the unrolled
    model.

    Args:
        looped: the model with its plan.
        plain: the unrolled model, or None when there is none.
        bare: the model without a plan.
        ids_BT: int64 prompt.
    """

    def error(model: nn.Module) -> float:
        return difference(_scores(model, ids_BT, True), _scores(model, ids_BT, False), "cached against recomputed")

    if plain is None:
        return as_good_as(error, looped, bare, "cached against recomputed")
    assert torch.equal(_generate(looped, ids_BT), _generate(plain, ids_BT)), (
        "greedy tokens differ from the unrolled model's"
    )
    if error(looped) <= TOLERANCE:
        return "holds"
    assert_close(
        _scores(looped, ids_BT, True), _scores(plain, ids_BT, True), "cached against the unrolled model's cached"
    )
    return "equals the unrolled model; plain transformers differs from recomputation itself"


def chunked_prefill(
    looped: PreTrainedModel, plain: PreTrainedModel | None, bare: PreTrainedModel, ids_BT: torch.Tensor
) -> str:
    """Law 3: a prompt in pieces gives the logits of one piece (or of the unrolled model in the same pieces)."""
    try:
        want = _in_pieces(plain or bare, ids_BT)
    except Exception as error:  # whatever stops plain transformers
        return f"plain transformers cannot prefill in pieces: {type(error).__name__}"
    got = _in_pieces(looped, ids_BT)
    if got is None or want is None:
        return "returns no cache"

    def error(model: nn.Module) -> float:
        return difference(_in_pieces(model, ids_BT), _logits(model, ids_BT), "prefill in pieces")

    if plain is not None and error(looped) > TOLERANCE:
        assert_close(got, want, "prefill in pieces against the unrolled model")
        return "equals the unrolled model; plain transformers differs from one piece itself"
    return as_good_as(error, looped, bare, "prefill in pieces")


def left_padding(
    looped: PreTrainedModel, plain: PreTrainedModel | None, bare: PreTrainedModel, ids_BT: torch.Tensor
) -> str:
    """Law 3: rows padded on the left generate what the unrolled model generates, or what recomputation gives."""
    mask = torch.ones_like(ids_BT)
    mask[0, :3] = 0
    got = _generate(looped, ids_BT, attention_mask=mask)
    if plain is not None:
        assert torch.equal(got, _generate(plain, ids_BT, attention_mask=mask)), (
            "left-padded batch: tokens differ from the unrolled model's"
        )
        return "holds"
    if torch.equal(got, _generate(looped, ids_BT, attention_mask=mask, use_cache=False)):
        return "holds"
    cached, full = (_generate(bare, ids_BT, attention_mask=mask, use_cache=use_cache) for use_cache in (True, False))
    assert not torch.equal(cached, full), "left-padded batch: cached tokens differ"
    return "as plain transformers, which differs itself"


@torch.no_grad()
def loop_counts(looped: PreTrainedModel, bare: PreTrainedModel, ids_BT: torch.Tensor) -> str:
    """Law 3: fewer loops than the tokens in the cache had runs; more is refused, or caught up exactly."""
    try:
        _in_pieces(bare, ids_BT)
    except Exception as error:  # whatever stops plain transformers
        return f"plain transformers cannot continue from a cache: {type(error).__name__}"
    name = _cache_name(looped)
    cache = _prefill(looped, ids_BT[:, :-2], loops=2)
    if cache is None:
        return "returns no cache"
    fewer = looped(ids_BT[:, -2:-1], **{name: cache}, use_cache=True, loops=1).logits
    assert torch.isfinite(fewer).all()
    try:
        looped(ids_BT[:, -1:], **{name: cache}, use_cache=True, loops=2)
    except ValueError as error:
        assert "deeper" in str(error), str(error)
    else:
        raise AssertionError("a call deeper than its cache was not refused")
    loopwise.set_cache(looped, "own", on_deeper="catch_up")
    try:
        cache = _prefill(looped, ids_BT[:, :-1], loops=1)
        got = looped(ids_BT[:, -1:], **{name: cache}, use_cache=True, loops=2).logits
        reference = _prefill(looped, ids_BT[:, :-1], loops=2)
        want = looped(ids_BT[:, -1:], **{name: reference}, use_cache=True, loops=2).logits
    except ValueError as error:
        assert "not available" in str(error), str(error)
        return f"fewer exact, more refused; {error}"
    finally:
        loopwise.set_cache(looped, "own")
    assert_close(got, want, "caught up")
    return "holds"


def round_trip(looped: PreTrainedModel, ids_BT: torch.Tensor) -> None:
    """Law 4: saved and loaded through the Auto class, the logits are bit for bit the same, and so is the plan."""
    with tempfile.TemporaryDirectory() as folder:
        looped.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert loopwise.plan_of(again) == loopwise.plan_of(looped), "round trip: another plan"
        assert type(again) is type(looped), f"round trip: {type(again).__name__}"
        assert torch.equal(_logits(again, ids_BT), _logits(looped, ids_BT)), "round trip: logits differ"


def causality(looped: PreTrainedModel, bare: PreTrainedModel, ids_BT: torch.Tensor) -> str:
    """Law 7: another last token does not change earlier logits."""
    other = ids_BT.clone()
    other[:, -1] = (other[:, -1] + 5) % 50 + 2

    def error(model: PreTrainedModel) -> float:
        return difference(_logits(model, other)[:, :-1], _logits(model, ids_BT)[:, :-1], "causality")

    return as_good_as(error, looped, bare, "causality")


def batch_independence(looped: PreTrainedModel, bare: PreTrainedModel, ids_BT: torch.Tensor) -> str:
    """Law 8: a row alone gives what it gives in a batch."""

    def error(model: PreTrainedModel) -> float:
        return difference(_logits(model, ids_BT[:1]), _logits(model, ids_BT)[:1], "a row alone")

    return as_good_as(error, looped, bare, "a row alone")


def deep_copy(looped: PreTrainedModel, ids_BT: torch.Tensor) -> None:
    """A deep copy runs the plan, on tensors of its own."""
    twin = copy.deepcopy(looped)
    assert torch.equal(_logits(twin, ids_BT), _logits(looped, ids_BT)), "deep copy: logits differ"
    with torch.no_grad():
        for parameter in layer_list(looped).layers.parameters():
            parameter.mul_(1.5)
    try:
        assert not torch.equal(_logits(twin, ids_BT), _logits(looped, ids_BT)), "deep copy: shares tensors"
    finally:
        with torch.no_grad():
            for parameter in layer_list(looped).layers.parameters():
                parameter.div_(1.5)


@contextlib.contextmanager
def attached(model: PreTrainedModel, plan: str) -> Iterator[PreTrainedModel]:
    """A model with a plan for the length of a block."""
    loopwise.attach(model, plan)
    try:
        yield model
    finally:
        loopwise.detach(model)


def _logits(model: PreTrainedModel, ids_BT: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids_BT, **kwargs).logits


def _gradients(model: PreTrainedModel, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.enable_grad():
        logits = model(ids_BT, use_cache=False).logits
        weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
        (logits * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _generate(model: PreTrainedModel, ids_BT: torch.Tensor, **kwargs: object) -> torch.Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids_BT)}
    return model.generate(ids_BT, **(options | kwargs))


def _scores(model: PreTrainedModel, ids_BT: torch.Tensor, use_cache: bool) -> torch.Tensor:
    """Logits of generated positions `[B, NEW_TOKENS, V]` along the greedy path of the cached model."""
    out = _generate(model, ids_BT, use_cache=use_cache, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, dim=1)


def _prefill(model: PreTrainedModel, ids_BT: torch.Tensor, loops: int) -> DynamicCache | None:
    cache = DynamicCache(config=text_config(model))
    with torch.no_grad():
        output = model(ids_BT, **{_cache_name(model): cache}, use_cache=True, loops=loops)
    return cache if getattr(output, _cache_name(model), None) is cache else None


def _in_pieces(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor | None:
    cache = DynamicCache(config=text_config(model))
    parts = []
    start = 0
    with torch.no_grad():
        for size in (3, ids_BT.shape[1] - 5, 1, 1):
            piece = ids_BT[:, start : start + size]
            positions = torch.arange(start, start + size)[None]
            output = model(piece, **{_cache_name(model): cache}, use_cache=True, **_positions(model, positions))
            if getattr(output, _cache_name(model), None) is not cache:
                return None
            parts.append(output.logits)
            start += size
    return torch.cat(parts, dim=1)


def _cache_name(model: PreTrainedModel) -> str:
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def _positions(model: PreTrainedModel, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    takes = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": positions} if takes else {}
