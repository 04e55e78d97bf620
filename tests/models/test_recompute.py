"""Checkpointed loops give the same gradients bit for bit, note nothing twice, and keep one state per iteration.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.loop.depth import LoopCounts
from loopwise.loop.state import RowSeeds
from loopwise.loop.window import GradientWindow
from loopwise.models.attach import learn_rows, set_hooks
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.readouts import loop_loss
from loopwise.train.parallel import checkpoint_loops
from tests.models.common import BREADTH, looped

PLAN = "0 core:(1-2)x4 3"
IDS_BT = torch.randint(19, (2, 7), generator=torch.Generator().manual_seed(0))


def ours(plan=PLAN, loops=None, *, dropout=0.0, **fields):
    block = BlockConfig(
        hidden_size=16,
        mixer=AttentionConfig(num_heads=2, out_dropout=dropout),
        mlp=MLPConfig(intermediate_size=24, dropout=dropout),
    )
    config = LoopwiseDecoderConfig(
        vocab_size=19,
        hidden_size=16,
        num_hidden_layers=4,
        blocks=[block.to_dict()],
        plan=plan,
        loops=loops or {},
        norm={"type": "rms"},
        initializer_range=0.3,
        **fields,
    )
    torch.manual_seed(0)
    return LoopwiseForCausalLM(config).train()


def gradients(model, ids_BT=IDS_BT, loss=None, **options):
    model.zero_grad()
    torch.manual_seed(5)
    if loss is None:
        value = model(input_ids=ids_BT, labels=ids_BT, **options).loss
    else:
        value = loss(model(input_ids=ids_BT, **options))
    value.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return found | {"loss": value.detach()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def visits_of(model, layer=1):
    """A list that grows by one whenever the layer runs."""
    runs = []
    found = loopwise.models.hub.layer_list(model).layers[layer]
    next(found.children()).register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("model_type", BREADTH)
def test_attached_models(model_type):
    model, ids_BT = looped(model_type)
    model.train()
    want = gradients(model, ids_BT)
    with torch.no_grad():
        logits = model(ids_BT).logits
    checkpoint_loops(model)
    runs = visits_of(model)
    assert_same(gradients(model, ids_BT), want)
    assert len(runs) == 2 * loopwise.plan_of(model).layers.count(1)
    with torch.no_grad():
        output = model(ids_BT)
    assert torch.equal(output.logits, logits)


RECURRENT = {"state": {"kind": "state.normal", "std": 0.5}, "update": {"kind": "update.concat"}, "turn": "norm"}
GATED = {"gate": True, "turn": {"type": "rms"}}
LOOPS = {
    "plain": (PLAN, None, {}),
    "recurrent": (PLAN, {"core": RECURRENT}, {}),
    "damped": (PLAN, {"core": {"update": {"kind": "update.damped"}, "grad": 2}}, {}),
    "gated": ("0 core:(1-2)x4", {"core": GATED}, {}),
    "nested": ("0 cycle:(low:(1)x2 high:(2)x1)x3 3", {"low": {"update": {"kind": "update.add"}}}, {}),
    "streams": (
        "cycle:(low:(0-1)x2 high:(2-3)x1)x3",
        {"low": {"stream": "l", "reads": ["h", "x"]}, "high": {"stream": "h", "reads": ["l"]}},
        {"streams": {"x": "input", "l": "learned", "h": "fixed"}},
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop_components(name):
    plan, loops, fields = LOOPS[name]
    model = ours(plan, loops, dropout=0.2, **fields)

    def options():
        return {"generator": torch.Generator().manual_seed(3)} if name == "recurrent" else {}

    want = gradients(model, **options())
    checkpoint_loops(model)
    runs = visits_of(model)
    assert_same(gradients(model, **options()), want)
    without = sum(not visit for visit in carries(model, 1))
    assert len(runs) == 2 * loopwise.plan_of(model).layers.count(1) - without


def carries(model, layer):
    plan, loops = loopwise.plan_of(model), model.config.loops
    last = {name: spec["grad"] for name, spec in loops.items() if "grad" in spec}
    window = GradientWindow(plan, last)
    slots = [slot for slot in plan.slots if slot.layer == layer]
    return [window.before(loopwise.loop.execute.Visit(slot=slot), torch.empty(0)).with_grad for slot in slots]


def test_what_iterations_leave_behind_is_noted_once():
    """States, logits and gates of every iteration are in the loss; what a second run notes must not reach them."""
    model = ours("0 core:(1-2)x4", {"core": GATED})
    want = gradients(model, loss=lambda output: loop_loss(output, IDS_BT), output_loops=True)
    checkpoint_loops(model)
    kept = {}

    def loss(output):
        kept["output"] = output
        return loop_loss(output, IDS_BT)

    assert_same(gradients(model, loss=loss, output_loops=True), want)
    assert len(kept["output"].loop_states) == kept["output"].gate_logits.shape[-1] == 4
    assert all(state.requires_grad for state in kept["output"].loop_states)


@pytest.mark.parametrize("collect", [True, False])
def test_hidden_states_of_an_attached_model(collect):
    model, ids_BT = looped("llama", PLAN.replace("3", "3-5"))
    model.train()

    def loss(output):
        states = output.hidden_states if collect else output.logits[None]
        return sum(state.square().mean() for state in states)

    want = gradients(model, ids_BT, loss, output_hidden_states=collect)
    checkpoint_loops(model)
    assert_same(gradients(model, ids_BT, loss, output_hidden_states=collect), want)


@pytest.mark.parametrize("golden", ["mor_expert", "ouro"])
def test_routers_and_exits_fall_back_to_single_visits(golden):
    model = loopwise.load(Path(__file__).parents[1] / "goldens" / golden).train()
    ids_BT = torch.randint(5, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    options = {"use_cache": False}
    if golden == "ouro":
        options |= {"halting": {"kind": "halting.hazard", "threshold": 0.6}, "on_exit": "skip"}
    want = gradients(model, ids_BT, **options)
    runs = visits_of(model)
    gradients(model, ids_BT, **options)
    once = len(runs)
    checkpoint_loops(model)
    runs.clear()
    assert_same(gradients(model, ids_BT, **options), want)
    assert len(runs) == 2 * once


class Counting:
    """A hook that acts: it halves the state after every second visit, and counts."""

    def __init__(self):
        self.num_calls = 0

    def before(self, visit, state_BTD):
        return visit

    def after(self, visit, before_BTD, state_BTD):
        self.num_calls += 1
        return state_BTD * 0.5 if self.num_calls % 2 else state_BTD


def test_hooks_of_others_act_once():
    def run(checkpointed):
        model, ids_BT = looped("llama")
        hook = Counting()
        set_hooks(model, [hook])
        if checkpointed:
            checkpoint_loops(model)
        return gradients(model.train(), ids_BT, use_cache=False), hook.num_calls

    (want, calls), (got, calls_again) = run(False), run(True)
    assert_same(got, want)
    assert calls == calls_again


@pytest.mark.parametrize("last", [1, 2])
def test_gradient_window_of_an_attached_model(last):
    model, ids_BT = looped("llama", "0 core:(1-2)x4 3-5")
    set_hooks(model, [GradientWindow(loopwise.plan_of(model), {"core": last})])
    want = gradients(model.train(), ids_BT)
    checkpoint_loops(model)
    runs = visits_of(model)
    assert_same(gradients(model, ids_BT), want)
    assert len(runs) == 4 + last, "iterations without a gradient are not run again"


def test_adapters():
    def build():
        torch.manual_seed(0)
        model = loopwise.attach(tiny_model("llama"), "0 core:(1-4)x2 5")
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.3)
        return get_peft_model(model, config).train()

    ids_BT = tiny_inputs(tiny_model("llama"))
    want = gradients(build(), ids_BT)
    assert_same(gradients(checkpoint_loops(build()), ids_BT), want)
    assert all("lora_" in name or name == "loss" for name in want)


@pytest.mark.parametrize("loop", ["low", "cycle"])
def test_the_loop_can_be_named(loop):
    model = ours("0 cycle:(low:(1)x3 2)x2 3")
    want = gradients(model)
    checkpoint_loops(model, loop)
    runs = visits_of(model, 2)
    assert_same(gradients(model), want)
    assert len(runs) == (2 if loop == "low" else 4)


COUNTS = LoopCounts(no_grad_B=torch.tensor([0, 3]), grad_B=torch.tensor([2, 2]))


@pytest.mark.parametrize("attached", [False, True])
def test_a_depth_for_every_row(attached):
    if attached:
        model, ids_BT = looped("llama", PLAN.replace("3", "3-5"))
        learn_rows(model.train())
        options = {}
    else:
        model, ids_BT = ours(loops={"core": RECURRENT}), IDS_BT
        options = {"generator": RowSeeds(seed=0, step=0, rows=(0, 1))}
    options |= {"loops": COUNTS, "use_cache": False}
    want = gradients(model, ids_BT, **options)
    runs = visits_of(model)
    gradients(model, ids_BT, **options)
    once = len(runs)
    checkpoint_loops(model)
    runs.clear()
    assert_same(gradients(model, ids_BT, **options), want)
    assert len(runs) == once + 2, "the two iterations with a gradient"


def saved(model, loops, **options):
    """How many numbers the graph of a forward keeps."""
    sizes = []

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=IDS_BT, labels=IDS_BT, loops=loops, **options)
    return sum(sizes)


@pytest.mark.parametrize("loops", [None, {"core": {"update": {"kind": "update.concat"}, "turn": "norm"}}])
def test_memory_grows_by_one_state_per_iteration(loops):
    model = ours(loops=loops)
    plain = saved(model, 8) - saved(model, 4)
    checkpoint_loops(model)
    grown = saved(model, 8) - saved(model, 4)
    state = 2 * 7 * 16
    assert grown == 4 * state
    assert plain > 20 * grown
    windowed = ours(loops={"core": (loops or {"core": {}})["core"] | {"grad": 2}})
    assert saved(windowed, 8) == saved(windowed, 4)
    checkpoint_loops(windowed)
    assert saved(windowed, 8) == saved(windowed, 4)


def test_a_graph_can_be_gone_through_twice_and_copies_keep_the_setting():
    model = checkpoint_loops(ours(loops={"core": {"update": {"kind": "update.concat"}}}))
    twin = copy.deepcopy(model)
    loss = model(input_ids=IDS_BT, labels=IDS_BT).loss
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name]), name
    runs = visits_of(twin)
    gradients(twin)
    assert len(runs) == 8


def test_refusals():
    model, ids_BT = looped("llama")
    with pytest.raises(ValueError, match="no loop 'cycle'"):
        checkpoint_loops(model, "cycle")
    with pytest.raises(ValueError, match="no plan"):
        checkpoint_loops(tiny_model("llama"))
    loopwise.set_cache(checkpoint_loops(model), "last")
    with pytest.raises(ValueError, match="checkpointed loops run layers again"):
        model(ids_BT)
    with torch.no_grad():
        assert model(ids_BT, use_cache=True).past_key_values is not None
    loopwise.set_cache(model, "own")
    assert model(ids_BT).past_key_values is None
    other, _ = looped("llama")
    other.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        checkpoint_loops(other)
