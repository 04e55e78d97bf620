"""Attach and detach: what they change, what they give back, and what they refuse."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from laws import assert_close, looping_plan, odd_plan
from tiny import tiny_inputs, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel, T5Config
from transformers import T5ForConditionalGeneration

import loopwise
from loopwise.models.attach import set_hooks
from loopwise.models.hub import layer_list

BREADTH = [
    "llama",
    "gpt2",
    "bloom",
    "gemma3_text",
    "mixtral",
    "deepseek_v3",
    "mamba",
    "mamba2",
    "recurrent_gemma",
    "falcon_h1",
    "zamba",
    "qwen3_next",
    "lfm2",
    "opt",
    "bert",
]
LOOPED = looping_plan(6)
HOOK_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def looped(model_type="llama", plan=LOOPED, **options):
    model = tiny_model(model_type)
    return loopwise.attach(model, plan, **options), tiny_inputs(model)


def logits(model, ids_BT, **options):
    with torch.no_grad():
        return model(ids_BT, **options).logits


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
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny_model(model_type).named_parameters()]
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
    wanted = {count: logits(loopwise.attach(tiny_model("llama"), f"0 core:(1-4)x{count} 5"), ids_BT) for count in (1, 2, 3)}
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


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("model_type", BREADTH)
def test_returns_tuples_and_dicts_as_before(model_type, return_dict):
    model, ids_BT = looped(model_type)
    with torch.no_grad():
        output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), return_dict=return_dict)
    assert isinstance(output, tuple) is not return_dict
    assert torch.equal(output[0], logits(model, ids_BT, attention_mask=torch.ones_like(ids_BT)))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "mamba2", "qwen3_next", "bloom"])
def test_dtype_changes_after_attach(model_type, dtype):
    model, ids_BT = looped(model_type)
    plain = loopwise.materialize(model).to(dtype)
    model.to(dtype)
    got, want = logits(model, ids_BT), logits(plain, ids_BT)
    assert got.dtype == want.dtype and {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(got, want), "the looped and the unrolled model differ in this precision"


def test_attach_in_half_precision():
    model = loopwise.attach(tiny_model("llama").to(torch.bfloat16), LOOPED)
    ids_BT = tiny_inputs(model)
    plain = loopwise.materialize(model)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(model, ids_BT), logits(plain, ids_BT))


SELF_COLLECTING = ["gpt2", "bloom", "mamba", "mamba2", "opt", "bert", "recurrent_gemma", "zamba"]
HOOK_COLLECTING = ["llama", "gemma3_text", "mixtral", "falcon_h1", "qwen3_next", "lfm2"]


@pytest.mark.parametrize("model_type", SELF_COLLECTING + HOOK_COLLECTING)
def test_hidden_states_are_those_of_the_unrolled_model(model_type):
    model, ids_BT = looped(model_type)
    num_slots = loopwise.plan_of(model).num_slots
    with torch.no_grad():
        got = model(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
        want = loopwise.materialize(model)(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
    assert len(got) == len(want) == num_slots + 1
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"hidden state {i}")


@pytest.mark.parametrize("plan", ["0", "(0)x2", "0-1", "core:(0-1)x2", "1 0"])
@pytest.mark.parametrize("model_type", ["llama", "bloom", "mamba"])
def test_hidden_states_of_shallow_models(model_type, plan):
    """Few layers leave little to tell what collected the states: the forward or hooks."""
    model = tiny_model(model_type, num_layers=2 if "1" in plan else 1)
    ids_BT = tiny_inputs(model)
    loopwise.attach(model, plan)
    with torch.no_grad():
        got = model(ids_BT, output_hidden_states=True).hidden_states
        want = loopwise.materialize(model)(ids_BT, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == loopwise.plan_of(model).num_slots + 1
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"hidden state {i}")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "mamba2"])
def test_hidden_states_after_detach_are_those_of_the_plain_model(model_type):
    model, ids_BT = looped(model_type)
    with torch.no_grad():
        model(ids_BT, output_hidden_states=True)
        got = loopwise.detach(model)(ids_BT, output_hidden_states=True).hidden_states
        want = tiny_model(model_type)(ids_BT, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 7
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_hidden_states_follow_the_configuration_and_the_counts_of_the_call():
    model, ids_BT = looped("bloom")
    model.config.output_hidden_states = True
    assert len(model(ids_BT).hidden_states) == 11
    assert len(model(ids_BT, loops=1).hidden_states) == 7


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "deepseek_v3", "opt", "bert"])
def test_attentions_are_those_of_the_unrolled_model_or_refused_by_name(model_type):
    model = tiny_model(model_type)
    model.set_attn_implementation("eager")
    ids_BT = tiny_inputs(model)
    plan = "0-2 core:(3-4)x2 5" if model_type == "deepseek_v3" else LOOPED
    loopwise.attach(model, plan)
    with torch.no_grad():
        try:
            got = model(ids_BT, output_attentions=True).attentions
        except ValueError as error:
            assert "attentions" in str(error) and "not available under a plan" in str(error)
            assert torch.isfinite(logits(model, ids_BT)).all()
            return
        want = loopwise.materialize(model)(ids_BT, output_attentions=True).attentions
    assert len(got) == len(want) == loopwise.plan_of(model).num_slots
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"attention {i}")


def test_router_logits_are_those_of_the_unrolled_model():
    model, ids_BT = looped("mixtral")
    with torch.no_grad():
        got = model(ids_BT, output_router_logits=True).router_logits
        want = loopwise.materialize(model)(ids_BT, output_router_logits=True).router_logits
    assert len(got) == len(want) == 10
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, f"router logits {i}")


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
        tokens = model.generate(prompts[index], max_new_tokens=5, do_sample=False)
        done.append((index, tokens))

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(done) == 4, "a thread failed or hangs"
    assert not wrong, f"wrong results in {len(wrong)} of 60 calls"
    for index, tokens in done:
        assert torch.equal(tokens, model.generate(prompts[index], max_new_tokens=5, do_sample=False))


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
