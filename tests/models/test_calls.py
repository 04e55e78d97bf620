"""Calls of a model with a plan: errors in the middle, copies, threads, hooks."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from laws import odd_plan
from tiny import tiny_inputs, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import loopwise
from loopwise.models.attach import set_hooks
from loopwise.models.hub import layer_list
from tests.models.common import logits, looped


def in_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert results, "no result from another thread"
    return results[0]


HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(model):
    """No plan, no hooks, and the real layer list in place."""
    hooks = sum(len(getattr(module, table)) for module in model.modules() for table in HOOK_TABLES)
    return loopwise.plan_of(model) is None and hooks == 0 and type(layer_list(model).layers) is nn.ModuleList


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.2", "model.norm", "lm_head"])
def test_an_error_inside_forward_leaves_the_real_layers(where, error):
    model, ids_BT = looped()
    layers, keys, want = model.model.layers, list(model.state_dict()), logits(model, ids_BT)

    def fail(*_):
        raise error("stop")

    handle = model.get_submodule(where).register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        model(ids_BT, loops=3)
    handle.remove()
    assert torch.equal(logits(model, ids_BT), want)
    assert model.model.layers is layers
    assert list(model.state_dict()) == keys
    assert in_another_thread(lambda: logits(model, ids_BT)).equal(want), "the model is still locked"


def test_an_interrupted_call_shows_the_real_layers_at_once():
    """Saving right after Ctrl-C must see the layers, before any other call."""
    model, ids_BT = looped()
    keys = list(model.state_dict())

    def interrupt(*_):
        raise KeyboardInterrupt

    model.model.layers[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids_BT)
    assert list(model.state_dict()) == keys


def test_an_error_in_a_call_with_bad_tokens_leaves_the_model_usable():
    model, ids_BT = looped()
    want = logits(model, ids_BT)
    with pytest.raises(IndexError):
        model(ids_BT + 1000)
    assert torch.equal(logits(model, ids_BT), want)


@pytest.mark.parametrize("copies", ["deepcopy", "pickle"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "recurrent_gemma", "mamba2", "mixtral"])
def test_copies_run_the_plan_and_are_independent(model_type, copies):
    model, ids_BT = looped(model_type, plan=odd_plan(6))
    want = logits(model, ids_BT)
    twin = copy.deepcopy(model) if copies == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model) and loopwise.plan_of(twin) == loopwise.plan_of(model)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert torch.equal(logits(twin, ids_BT), want)
    loopwise.set_loops(twin, a=1, b=1)
    assert not torch.equal(logits(twin, ids_BT), want) and torch.equal(logits(model, ids_BT), want)
    loopwise.detach(twin)
    assert is_plain(twin) and torch.equal(logits(twin, ids_BT), logits(tiny_model(model_type), ids_BT))
    assert torch.equal(logits(model, ids_BT), want)


def test_a_copy_saves_itself(tmp_path):
    model, ids_BT = looped()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(loopwise.load(tmp_path), ids_BT), logits(twin, ids_BT))


def test_threads_may_share_a_model():
    model, ids_BT = looped()
    prompts = [tiny_inputs(model, seed=seed) for seed in range(4)]
    with torch.no_grad():
        wanted = [logits(model, ids, loops=count) for ids, count in zip(prompts, (1, 2, 3, 4), strict=True)]
    wrong, done = [], []

    def work(index):
        for _ in range(15):
            if not torch.equal(logits(model, prompts[index], loops=index + 1), wanted[index]):
                wrong.append(index)
        done.append((index, model.generate(prompts[index], max_new_tokens=5, do_sample=False, loops=index + 1)))

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(done) == 4, "a thread failed or hangs"
    assert not wrong, f"wrong results in {len(wrong)} of 60 calls"
    for index, tokens in done:
        assert torch.equal(tokens, model.generate(prompts[index], max_new_tokens=5, do_sample=False, loops=index + 1))


def test_a_block_with_other_counts_is_of_its_thread():
    model, ids_BT = looped()
    want = logits(model, ids_BT)
    with loopwise.use_loops(model, 3):
        assert loopwise.plan_of(model).counts == {"core": 3}
        assert in_another_thread(lambda: logits(model, ids_BT)).equal(want)
        assert loopwise.plan_of(copy.deepcopy(model)).counts == {"core": 3}
        loopwise.set_loops(model, 4)
        assert loopwise.plan_of(model).counts == {"core": 4}
    assert loopwise.plan_of(model).counts == {"core": 2}
    assert torch.equal(logits(model, ids_BT), want)


class Trace:
    """Notes the visits around which it is called."""

    def __init__(self):
        self.seen = []

    def before(self, visit, state_BTD):
        self.seen.append(("before", visit.slot.key, visit.slot.layer))
        return visit

    def after(self, visit, before_BTD, state_BTD):
        self.seen.append(("after", visit.slot.key, visit.slot.layer))
        return state_BTD


class Scale:
    """Multiplies the state after every visit of one layer."""

    def __init__(self, layer):
        self.layer = layer

    def before(self, visit, state_BTD):
        return visit

    def after(self, visit, before_BTD, state_BTD):
        return state_BTD * 2 if visit.slot.layer == self.layer else state_BTD


@pytest.mark.parametrize("model_type", ["llama", "mamba2", "bloom"])
def test_hooks_are_called_around_every_visit_in_order(model_type):
    trace = Trace()
    model, ids_BT = looped(model_type, plan=odd_plan(6), hooks=[trace])
    assert trace.seen == [], "the trial run of attach called hooks"
    logits(model, ids_BT)
    slots = loopwise.plan_of(model).slots
    assert trace.seen == [(when, slot.key, slot.layer) for slot in slots for when in ("before", "after")]
    set_hooks(model, [])
    trace.seen.clear()
    logits(model, ids_BT)
    assert trace.seen == []


def test_hooks_change_the_state_and_survive_a_copy():
    model, ids_BT = looped(hooks=[Scale(2)])
    oracle, _ = looped()
    oracle.model.layers[2].register_forward_hook(lambda layer, args, output: output * 2)
    want = logits(oracle, ids_BT)
    assert torch.equal(logits(model, ids_BT), want)
    assert torch.equal(logits(copy.deepcopy(model), ids_BT), want)


def test_tensors_given_by_the_caller_are_not_changed():
    model, _ = looped()
    embeds_BTD = torch.randn(2, 5, 32)
    kept = embeds_BTD.clone()
    with torch.no_grad():
        model(inputs_embeds=embeds_BTD)
    assert torch.equal(embeds_BTD, kept)


def test_dropout_in_training_mode_is_that_of_the_plain_model_under_the_identity_plan():
    config = GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3)
    model = GPT2LMHeadModel(config).train()
    ids_BT = torch.arange(12).view(2, 6)
    torch.manual_seed(0)
    want = model(ids_BT).logits
    loopwise.attach(model, "0-2")
    torch.manual_seed(0)
    assert torch.equal(model(ids_BT).logits, want)
