"""Attach and detach: what they change, what they give back, and what they refuse."""

from __future__ import annotations

import threading

import pytest
import torch
from laws import assert_close
from tiny import tiny_inputs, tiny_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

import loopwise
from loopwise.models.attach import set_hooks
from loopwise.models.hub import layer_list
from tests.models.common import BREADTH, LOOPED, logits, looped

HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def anatomy(model):
    """Everything that attach may touch: hooks, attributes, children and tensors of every module."""
    return {
        path: (
            {table: len(getattr(module, table)) for table in HOOK_TABLES},
            sorted(set(module.__dict__) - {"forward"}),
            {name: id(child) for name, child in module.named_children()},
            {name: parameter.data_ptr() for name, parameter in module.named_parameters(recurse=False)},
        )
        for path, module in model.named_modules()
    }


def is_plain(model):
    """No plan, no hooks, and the real layer list in place."""
    hooks = sum(len(getattr(module, table)) for module in model.modules() for table in HOOK_TABLES)
    return loopwise.plan_of(model) is None and hooks == 0 and type(layer_list(model).layers) is nn.ModuleList


@pytest.mark.parametrize("model_type", BREADTH)
def test_detach_restores_everything(model_type):
    model = tiny_model(model_type)
    ids_BT = tiny_inputs(model)
    kind, want, before = type(model), logits(model, ids_BT), anatomy(model)
    keys = list(model.state_dict())
    assert loopwise.attach(model, LOOPED) is model
    assert type(model) is kind and list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in tiny_model(model_type).named_parameters()
    ]
    assert not torch.allclose(logits(model, ids_BT), want, atol=1e-3), "the plan has no effect"
    assert loopwise.detach(model) is model
    assert anatomy(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, ids_BT), want)


@pytest.mark.parametrize("model_type", ["llama", "recurrent_gemma", "mixtral"])
def test_attach_keeps_training_mode_and_gradients(model_type):
    model = tiny_model(model_type).train()
    next(layer_list(model).layers[1].children()).eval()
    modes = [module.training for module in model.modules()]
    loopwise.attach(model, LOOPED)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_attach_draws_no_random_numbers():
    model = tiny_model("llama").train()
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    loopwise.attach(model, LOOPED)
    assert torch.equal(torch.rand(3), want)


def test_plan_of_and_counts_at_run_time():
    model, ids_BT = looped()
    assert loopwise.plan_of(model) == loopwise.Plan.parse(LOOPED)
    wanted = {
        count: logits(loopwise.attach(tiny_model("llama"), f"0 core:(1-4)x{count} 5"), ids_BT) for count in (1, 2, 3)
    }
    for count, want in wanted.items():
        assert torch.equal(logits(model, ids_BT, loops=count), want)
        assert torch.equal(logits(model, ids_BT, loops={"core": count}), want)
        with loopwise.use_loops(model, core=count):
            assert torch.equal(logits(model, ids_BT), want)
        assert torch.equal(logits(model, ids_BT), wanted[2]), "a count for one call stayed"
        assert loopwise.set_loops(model, count) is model
        assert loopwise.plan_of(model).counts == {"core": count}
        assert torch.equal(logits(model, ids_BT), want)
        loopwise.set_loops(model, core=2)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "bert", "mamba2", "recurrent_gemma", "opt"])
def test_loops_of_one_call_for_other_forwards(model_type):
    """Also where the model's forward takes no further arguments."""
    model, ids_BT = looped(model_type)
    want = logits(loopwise.attach(tiny_model(model_type), "0 core:(1-4)x3 5"), ids_BT)
    assert_close(logits(model, ids_BT, loops=3), want, "three iterations")


def test_counts_when_attaching():
    model, _ = looped(loops={"core": 5})
    assert loopwise.plan_of(model).counts == {"core": 5}


def test_loops_reach_generate_through_use_loops_and_come_back_after_errors():
    model, ids_BT = looped()
    loopwise.set_loops(model, 3)
    want = model.generate(ids_BT, max_new_tokens=4, do_sample=False)
    loopwise.set_loops(model, 1)
    with pytest.raises(RuntimeError, match="inside"), loopwise.use_loops(model, 3):
        assert torch.equal(model.generate(ids_BT, max_new_tokens=4, do_sample=False), want)
        raise RuntimeError("inside")
    assert loopwise.plan_of(model).counts == {"core": 1}


@pytest.mark.parametrize("plan", ["0-6", "7", "0-5 (3-9)x2", "100000"])
def test_a_plan_outside_the_layers_is_refused(plan):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="layer") as caught:
        loopwise.attach(model, plan)
    assert "\n" not in str(caught.value).strip() or isinstance(caught.value, loopwise.PlanError)
    assert is_plain(model)


@pytest.mark.parametrize("plan", ["", "  ", "()x2", "core:()x2", "(1-2)x0", "core:(1-2)x-1", "5-2", "a b", "0-"])
def test_empty_loops_zero_counts_and_bad_text_are_refused(plan):
    model = tiny_model("llama")
    with pytest.raises(loopwise.PlanError):
        loopwise.attach(model, plan)
    assert is_plain(model)


BAD_COUNTS = [0, -1, True, 2.5, "core", "2", [1], {"cores": 2}, {"core": 0}, {"core": "2"}, {"": 2}]


@pytest.mark.parametrize("loops", BAD_COUNTS, ids=repr)
def test_bad_loop_counts_are_refused_and_leave_the_model_usable(loops):
    model, ids_BT = looped()
    want = logits(model, ids_BT)
    for attempt in (
        lambda: loopwise.set_loops(model, loops),
        lambda: loopwise.use_loops(model, loops).__enter__(),
        lambda: model(ids_BT, loops=loops),
        lambda: loopwise.attach(tiny_model("llama"), LOOPED, loops=loops),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1, str(caught.value)
        assert loopwise.plan_of(model).counts == {"core": 2}
        assert torch.equal(logits(model, ids_BT), want)
    assert in_another_thread(lambda: logits(model, ids_BT)).equal(want), "the model is still locked"


def in_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert results, "no result from another thread"
    return results[0]


def test_a_misspelt_loop_suggests_the_nearest():
    model, ids_BT = looped()
    with pytest.raises(ValueError, match="did you mean core"):
        model(ids_BT, loops={"cor": 3})
    with pytest.raises(ValueError, match="did you mean core"):
        loopwise.set_loops(model, Core=3)
    flat, _ = looped(plan="0-3 2-5")
    with pytest.raises(ValueError, match="no loop"):
        flat(ids_BT, loops=3)


def test_attach_twice_and_missing_plans_are_refused():
    model, ids_BT = looped()
    want = logits(model, ids_BT)
    with pytest.raises(ValueError, match="already"):
        loopwise.attach(model, "0-5")
    with pytest.raises(ValueError, match="already"):
        loopwise.attach(model.model, "0-5")
    assert torch.equal(logits(model, ids_BT), want)
    loopwise.detach(model)
    for action in (
        lambda: loopwise.detach(model),
        lambda: loopwise.set_loops(model, 2),
        lambda: loopwise.set_cache(model, "last"),
        lambda: loopwise.materialize(model),
        lambda: set_hooks(model, []),
    ):
        with pytest.raises(ValueError, match="no plan"):
            action()
    assert is_plain(model)


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="encoder-decoder"):
        loopwise.attach(model, "0-1")
    with pytest.raises(ValueError, match="encoder-decoder"):
        loopwise.materialize(model, loopwise.Plan.parse("0-1"))
    assert all(not getattr(module, table) for module in model.modules() for table in HOOK_TABLES)


class _Bare(PreTrainedModel):
    """A language model without a list of layers."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(99, 8), nn.Linear(8, 99)

    def forward(self, input_ids, **_):
        return {"logits": self.head(self.embed(input_ids))}


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="no recognisable list of decoder layers"):
        loopwise.attach(_Bare(PreTrainedConfig()), "0")


@pytest.mark.parametrize("thing", ["gpt2", None, 3, nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])], ids=repr)
def test_things_that_are_no_model_are_refused(thing):
    for action in (lambda: loopwise.attach(thing, "0"), lambda: loopwise.materialize(thing, loopwise.Plan.parse("0"))):
        with pytest.raises(ValueError, match="model") as caught:
            action()
        assert len(str(caught.value).splitlines()) == 1


def test_a_model_without_logits_is_refused():
    with pytest.raises(ValueError, match="LlamaModel returns no logits"):
        loopwise.attach(tiny_model("llama").model, "0-5")


def test_a_backbone_that_computes_between_its_layers_is_refused():
    """Gemma-4 mixes per-layer inputs between the layers; nothing of a failed attempt may stay."""
    model = tiny_model("gemma4_text")
    before, want = anatomy(model), logits(model, tiny_inputs(model))
    with pytest.raises(ValueError, match="cannot be looped"):
        loopwise.attach(model, LOOPED)
    assert anatomy(model) == before
    assert torch.equal(logits(model, tiny_inputs(model)), want)


def test_a_plan_without_the_layer_that_computes_shared_keys_is_refused():
    """The last layers of this Gemma-3n read the keys and values of earlier ones."""
    model = tiny_model("gemma3n_text")
    before, want = anatomy(model), logits(model, tiny_inputs(model))
    with pytest.raises(ValueError, match="Gemma3nForCausalLM does not run under plan 4-5") as caught:
        loopwise.attach(model, "4-5")
    assert len(str(caught.value).splitlines()) == 1
    assert anatomy(model) == before
    assert torch.equal(logits(model, tiny_inputs(model)), want)
    loopwise.attach(model, "0-3 core:(4-5)x2")
    assert torch.isfinite(logits(model, tiny_inputs(model))).all()
