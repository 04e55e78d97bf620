"""Loop components on attached models: identity, training, caches, saving, and what is refused.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from laws import as_good_as, assert_close, difference
from peft import LoraConfig, get_peft_model
from tiny import tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM

import loopwise
from loopwise.edit.apply import apply
from loopwise.edit.surgery import Retrofit
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.state import RowSeeds
from loopwise.models.hub import layer_list
from loopwise.models.loop_parts import add_loops, needs_generator
from loopwise.models.realise import materialize
from loopwise.train.batch import Batch
from loopwise.train.evaluate import predict
from loopwise.train.objectives.forward import forward_at
from loopwise.train.parallel import checkpoint_loops
from tests.loop.test_compose import prompt, sharded_training
from tests.models.common import BREADTH, LOOPED, logits, looped
from tests.models.test_recompute import ours
from tests.train.ranks import on_ranks

IDENTITY = {"core": {"update": {"kind": "update.concat", "init": "pass_state"}}}
ADAPTER = {"core": {"state": {"kind": "state.zeros"}, "update": {"kind": "update.concat"}, "turn": {"type": "rms"}}}
PUBLISHED = {"core": {"state": {"kind": "state.normal", "std": 0.3}, "update": {"kind": "update.concat"}}}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def with_parts(model_type="llama", loops=ADAPTER, plan=LOOPED):
    model, ids_BT = looped(model_type, plan)
    torch.manual_seed(7)
    return add_loops(model, loops), ids_BT


@pytest.mark.parametrize("model_type", BREADTH)
def test_the_identity_adapter_changes_nothing(model_type):
    """Exactly: `[I | 0]` adds zeros to the state, at one pass and at several."""
    model, ids_BT = looped(model_type)
    want = [logits(model, ids_BT, loops=count) for count in (1, 2)]
    add_loops(model, IDENTITY)
    assert all(torch.equal(logits(model, ids_BT, loops=count), want[count - 1]) for count in (1, 2))


def test_a_retrofitted_model_is_the_old_one_at_one_pass():
    for model_type in ("llama", "gpt2", "mixtral", "gemma2"):
        model = tiny_model(model_type)
        ids_BT = tiny_inputs(model)
        new = apply(model, Retrofit(prelude=2, core=3, coda=1))
        assert torch.equal(logits(new, ids_BT), logits(model, ids_BT)), model_type
        assert not torch.equal(logits(new, ids_BT, loops=3), logits(model, ids_BT)), model_type


def test_an_attached_model_computes_what_its_layers_and_the_adapter_say():
    """Against a naive loop over the layers."""
    model, ids_BT = with_parts(loops=ADAPTER, plan="0 core:(1-2)x3 3-5")
    inner, core = model.model, model.model.loops["core"]
    positions = torch.arange(ids_BT.shape[1])[None]
    with torch.no_grad():
        x_BTD = inner.embed_tokens(ids_BT)
        tables = inner.rotary_emb(x_BTD, positions)

        def layer(number, state_BTD):
            return inner.layers[number](state_BTD, position_embeddings=tables, position_ids=positions)

        e_BTD = layer(0, x_BTD)
        state_BTD = torch.zeros_like(e_BTD)
        for _ in range(3):
            state_BTD = core.update.adapter(torch.cat([state_BTD, e_BTD], dim=-1))
            state_BTD = core.turn(layer(2, layer(1, state_BTD)))
        for number in (3, 4, 5):
            state_BTD = layer(number, state_BTD)
        want_BTV = model.lm_head(inner.norm(state_BTD))
    assert_close(logits(model, ids_BT, use_cache=False), want_BTV, "naive loop")


@pytest.mark.parametrize("model_type", BREADTH)
def test_cached_generation_equals_recomputation(model_type):
    """Law 3."""
    model, ids_BT = with_parts(model_type)

    def error(model):
        options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
        found = [model.generate(ids_BT, use_cache=flag, **options) for flag in (True, False)]
        return difference(*(torch.stack(item.logits) for item in found), "cached against recomputed")

    as_good_as(error, model, tiny_model(model_type), "cached against recomputed")


def test_generation_with_more_loops_and_a_first_state():
    model, ids_BT = with_parts(loops=PUBLISHED)
    state_D = torch.randn(32, generator=torch.Generator().manual_seed(1))
    options = GREEDY | {"loops": 4, "initial_state": state_D}
    tokens = [model.generate(ids_BT, use_cache=flag, **options) for flag in (True, False)]
    assert torch.equal(*tokens)
    assert not torch.equal(tokens[0], model.generate(ids_BT, **GREEDY, loops=4, initial_state=-state_D))
    beams = [model.generate(ids_BT, use_cache=flag, num_beams=3, **options) for flag in (True, False)]
    assert torch.equal(*beams)
    drawn = [model.generate(ids_BT, generator=torch.Generator().manual_seed(seed), **GREEDY) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_calls_that_need_further_calls_first():
    """Shared stores go token by token, a shallower prefix is caught up with: all with the state of the call."""
    model, ids_BT = with_parts(loops=PUBLISHED)
    state = {"initial_state": torch.randn(32, generator=torch.Generator().manual_seed(1))}
    loopwise.set_cache(model, "last")
    cached = model.generate(ids_BT, **GREEDY, **state)
    by_token = [logits(model, cached[:, :end], **state)[:, -1].argmax(-1) for end in range(10, 16)]
    assert torch.equal(cached[:, 10:], torch.stack(by_token, dim=1))
    loopwise.set_cache(model, "own", on_deeper="catch_up")
    with torch.no_grad():
        cache = model(ids_BT[:, :-1], loops=1, use_cache=True, **state).past_key_values
        last = model(ids_BT[:, -1:], past_key_values=cache, **state).logits
    assert_close(last[:, -1], logits(model, ids_BT, **state)[:, -1], "caught up")


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "mixtral", "gemma3_text", "mamba2", "falcon_h1", "bloom", "opt"]
)
def test_a_saved_model_computes_the_same(model_type, tmp_path):
    """Law 4, through our own door and that of transformers."""
    model, ids_BT = with_parts(model_type)
    loopwise.save(model, tmp_path / "saved")
    for again in (loopwise.load(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()):
        assert torch.equal(logits(again, ids_BT), logits(model, ids_BT))
        mine, theirs = model.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_random_first_states():
    """A generator, seeds of rows, or a state; nothing is drawn in secret."""
    model, ids_BT = with_parts(loops=PUBLISHED)
    assert needs_generator(model) and not needs_generator(with_parts()[0]) and not needs_generator(looped()[0])
    with pytest.raises(ValueError, match="pass a torch.Generator"):
        logits(model, ids_BT)
    first = [logits(model, ids_BT, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    both = logits(model, ids_BT, generator=RowSeeds(seed=1, step=2, rows=(0, 1)))
    second = logits(model, ids_BT[1:], generator=RowSeeds(seed=1, step=2, rows=(1,)))
    assert_close(second, both[1:], "a row alone")
    zeros = logits(model, ids_BT, initial_state=torch.zeros(32))
    assert not torch.equal(zeros, first[0])
    with pytest.raises(ValueError, match="pass a torch.Generator"):  # what one call is told, the next one is not
        logits(model, ids_BT)


def test_training_with_sampled_counts_and_windows():
    """Values do not depend on the window, and the gradient is that of the last iterations."""
    model, ids_BT = with_parts()
    found = {}
    for window in (None, 2, 8):
        model.zero_grad()
        options = {} if window is None else {"window": window}
        output = model(ids_BT, labels=ids_BT, use_cache=False, loops=8, **options)
        output.loss.backward()
        found[window] = output.loss.item(), model.model.loops["core"].update.adapter.weight.grad.clone()
    assert len({loss for loss, _ in found.values()}) == 1
    assert torch.equal(found[None][1], found[8][1]) and not torch.allclose(found[2][1], found[8][1])
    assert found[2][1].any()


def test_every_row_at_its_own_depth():
    model, ids_BT = with_parts()
    counts = LoopCounts(no_grad_B=torch.tensor([0, 2]), grad_B=torch.tensor([1, 2]))
    got = logits(model, ids_BT, loops=counts, use_cache=False)
    want = [logits(model, ids_BT[row : row + 1], loops=loops, use_cache=False) for row, loops in ((0, 1), (1, 4))]
    assert_close(got, torch.cat(want), "rows alone")


def test_checkpointed_loops_give_the_same_gradients():
    model, ids_BT = with_parts(loops=PUBLISHED)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_loops(model)
        model.zero_grad()
        generator = torch.Generator().manual_seed(0)
        model(ids_BT, labels=ids_BT, use_cache=False, loops=4, window=2, generator=generator).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_a_step_of_training_draws_by_seed_step_and_row():
    """The training room gives random first states their seeds, on attached models too."""
    model, ids_BT = with_parts(loops=PUBLISHED)
    batch = Batch(tokens_BT=ids_BT, targets_BT=ids_BT)
    count = LoopCount(no_grad=1, grad=2)
    outputs = [forward_at(model, batch, count, seed=1, step=step).logits for step in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert torch.equal(predict(model, batch), predict(model, batch))


def sharded_parts():
    return with_parts(plan="0 core:(1-4)x2 5")[0]


def test_sharded_training():
    """The components are gathered with the root, however often their loop turns."""
    assert on_ranks(sharded_training, sharded_parts, prompt, {"loops": 5}) == [4, 4]


def test_the_window_of_the_components_is_that_of_calls():
    model, ids_BT = with_parts(loops={"core": ADAPTER["core"] | {"grad": 1}})
    model(ids_BT, labels=ids_BT, use_cache=False, loops=4).loss.backward()
    own = model.model.loops["core"].update.adapter.weight.grad.clone()
    model.zero_grad()
    model(ids_BT, labels=ids_BT, use_cache=False, loops=4, window=4).loss.backward()
    assert not torch.allclose(own, model.model.loops["core"].update.adapter.weight.grad)
    logits(
        model, ids_BT, loops=LoopCounts(no_grad_B=torch.tensor([0, 0]), grad_B=torch.tensor([1, 2])), use_cache=False
    )


def test_copies_pickles_and_detach():
    model, ids_BT = with_parts()
    want = logits(model, ids_BT)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.model.loops["core"].update.adapter.weight.data.zero_()
    for twin in twins:
        assert torch.equal(logits(twin, ids_BT), want)
    loopwise.detach(model)
    plain = tiny_model("llama")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(model, ids_BT), logits(plain, ids_BT))


def test_adapters_on_top():
    model, ids_BT = with_parts()
    want = logits(model, ids_BT)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "adapter"], init_lora_weights=False))
    after = logits(adapted, ids_BT)
    assert not torch.allclose(after, want, atol=1e-3)
    assert_close(logits(adapted.merge_and_unload(), ids_BT), after, "merged")


def test_bf16():
    model, ids_BT = looped()
    half = add_loops(model.to(torch.bfloat16), ADAPTER)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert logits(half, ids_BT).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("loops", "message"),
    [
        ({"middle": {}}, "loops names 'middle', the plan .* has core"),
        ({"core": {"gate": True}}, "has 'gate', which an attached model lacks"),
        ({"core": {"signal": {"kind": "signal.none"}}}, "has 'signal', which an attached model lacks"),
        ({"core": {"route": {"kind": "route.experts"}}}, "has 'route', which an attached model lacks"),
        ({"core": {"stream": "high"}}, "has 'stream', which an attached model lacks"),
        ({"core": {"updat": {}}}, "an unknown component 'updat'"),
        ({"core": {"exit": "norm"}}, "needs a norm's dictionary"),
        ({"core": {"update": {"kind": "update.concat", "init": "state"}}}, "init='state' must be one of"),
        ({}, "name at least one loop"),
    ],
)
def test_refused_components(loops, message):
    model, ids_BT = looped()
    want = logits(model, ids_BT)
    with pytest.raises(ValueError, match=message):
        add_loops(model, loops)
    assert torch.equal(logits(model, ids_BT), want)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no plan"):
        add_loops(tiny_model("llama"), ADAPTER)
    with pytest.raises(ValueError, match="is a model of loopwise"):
        add_loops(ours(), ADAPTER)
    model, ids_BT = with_parts()
    with pytest.raises(ValueError, match="components already"):
        add_loops(model, ADAPTER)
    with pytest.raises(ValueError, match="components of their own"):
        materialize(model)
    with pytest.raises(ValueError, match="'auto_map' does not hold loops"):
        loopwise.save(model, tmp_path / "code", format="auto_map")
    with pytest.raises(ValueError, match="collect= is for models of loopwise"):
        model(ids_BT, loop_options={"collect": "core"})
    loopwise.save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="made for the plan"):
        loopwise.load(tmp_path / "saved", plan="0-5")
    assert len(layer_list(model).layers) == 6
