"""Every way of generating gives, under a plan, what the unrolled model gives: token for token."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import assert_close, odd_plan
from tiny import tiny_inputs, tiny_model
from transformers import DynamicCache

import loopwise
from tests.models.common import LOOPED

ATTENTION = ["llama", "gpt2", "bloom", "gemma3_text", "mixtral", "opt", "bert"]
STATE = ["mamba", "mamba2", "recurrent_gemma", "falcon_h1", "zamba", "qwen3_next", "lfm2"]
NEW_TOKENS = 8


def looped(model_type, plan=LOOPED, **options):
    model = tiny_model(model_type, **options)
    return loopwise.attach(model, plan), tiny_inputs(model)


def generate(model, ids_BT, **options):
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids_BT)}
    return model.generate(ids_BT, **(settings | options))


def assert_as_unrolled(model, ids_BT, **options):
    got = generate(model, ids_BT, **options)
    assert torch.equal(got, generate(loopwise.materialize(model), ids_BT, **options))
    assert got.shape[1] == ids_BT.shape[1] + NEW_TOKENS
    return got


@pytest.mark.parametrize("plan", [LOOPED, odd_plan(6), "2-5", "0-3 1-4", "5 4 3 2 1 0"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "falcon_h1"])
def test_greedy_under_many_plans(model_type, plan):
    model, ids_BT = looped(model_type, plan)
    got = assert_as_unrolled(model, ids_BT)
    assert torch.equal(got, generate(model, ids_BT, use_cache=False))


@pytest.mark.parametrize("model_type", ATTENTION + STATE)
def test_sampling_with_a_seed(model_type):
    model, ids_BT = looped(model_type)
    plain = loopwise.materialize(model)
    drawn = []
    for each in (model, plain):
        torch.manual_seed(11)
        drawn.append(generate(each, ids_BT, do_sample=True, temperature=1.5, top_k=20))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("model_type", [*ATTENTION, "falcon_h1", "qwen3_next", "lfm2"])
def test_beam_search(model_type):
    model, ids_BT = looped(model_type)
    assert_as_unrolled(model, ids_BT, num_beams=3)
    assert_as_unrolled(model, ids_BT, num_beams=4, num_return_sequences=2, length_penalty=0.5)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral", "opt", "qwen3_next"])
def test_static_cache(model_type):
    model, ids_BT = looped(model_type)
    options = {"cache_implementation": "static", "disable_compile": True}
    got = assert_as_unrolled(model, ids_BT, **options)
    assert torch.equal(got, generate(model, ids_BT, use_cache=False))
    with loopwise.use_loops(model, 3):
        assert_as_unrolled(model, ids_BT, **options)
    loopwise.detach(model)
    assert torch.equal(generate(model, ids_BT, **options), generate(tiny_model(model_type), ids_BT, **options))


@pytest.mark.parametrize("model_type", [*ATTENTION, "falcon_h1", "qwen3_next", "mamba2", "recurrent_gemma"])
def test_left_padding(model_type):
    model, ids_BT = looped(model_type)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    other_BT = ids_BT.clone()
    other_BT[0, :4] = 7
    got = assert_as_unrolled(model, ids_BT, attention_mask=mask_BT)
    if model_type == "recurrent_gemma":  # the recurrence of the plain model reads padding, too
        return
    assert torch.equal(got[:, 10:], generate(model, other_BT, attention_mask=mask_BT)[:, 10:]), "padding is seen"
    if model_type in ATTENTION and model_type != "bert":
        alone = generate(model, ids_BT[:1, 4:])
        assert torch.equal(got[:1, 10:], alone[:, 6:])


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("model_type", [*ATTENTION, "falcon_h1", "qwen3_next"])
def test_chunked_prefill(model_type, size):
    model, ids_BT = looped(model_type)
    got = assert_as_unrolled(model, ids_BT, prefill_chunk_size=size)
    assert torch.equal(got, generate(model, ids_BT))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mixtral", "bloom", "opt"])
def test_prompt_lookup(model_type):
    model, _ = looped(model_type)
    ids_BT = torch.tensor([[9, 8, 7, 6, 9, 8, 7, 6, 9, 8]])
    got = generate(model, ids_BT, prompt_lookup_num_tokens=3, max_matching_ngram_size=2, max_new_tokens=20)
    assert torch.equal(got, generate(model, ids_BT, max_new_tokens=20))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("assistant", ["plain", "looped", "itself", "fewer layers"])
def test_assisted_generation(model_type, assistant):
    """Drafts are cropped from all slots of both caches."""
    model, ids_BT = looped(model_type)
    helper = tiny_model(model_type, seed=0 if assistant in ("itself", "fewer layers") else 1)
    plans = {"looped": "0 (1-2)x3 3", "itself": LOOPED, "fewer layers": "0 2-5"}
    if assistant != "plain":
        loopwise.attach(helper, plans[assistant])
    for row_BT in (ids_BT[:1], ids_BT[1:]):
        want = generate(model, row_BT, max_new_tokens=16)
        got = generate(model, row_BT, max_new_tokens=16, assistant_model=helper, num_assistant_tokens=4)
        assert torch.equal(got, want)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gemma3_text", "qwen3_next", "mamba2"])
def test_inputs_embeds(model_type):
    model, ids_BT = looped(model_type)
    embeds_BTD = model.get_input_embeddings()(ids_BT)
    with torch.no_grad():
        assert_close(model(inputs_embeds=embeds_BTD).logits, model(ids_BT).logits, "embeds against ids")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids_BT)}
    got = model.generate(inputs_embeds=embeds_BTD, **options)
    assert torch.equal(got, loopwise.materialize(model).generate(inputs_embeds=embeds_BTD, **options))
    assert torch.equal(got, generate(model, ids_BT)[:, ids_BT.shape[1] :])


@pytest.mark.parametrize("model_type", ["llama", "mamba2", "recurrent_gemma"])
def test_loops_of_one_generation(model_type):
    model, ids_BT = looped(model_type)
    plain = loopwise.materialize(loopwise.attach(tiny_model(model_type), "0 core:(1-4)x3 5"))
    want = generate(plain, ids_BT)
    assert torch.equal(generate(model, ids_BT, loops=3), want)
    assert torch.equal(generate(model, ids_BT, loops={"core": 3}), want)
    assert loopwise.plan_of(model).counts == {"core": 2}
    with pytest.raises(ValueError, match="did you mean core"):
        generate(model, ids_BT, loops={"cor": 3})
    assert torch.equal(generate(copy.deepcopy(model), ids_BT, loops=3), want), "a copy generates with another model"


@pytest.mark.parametrize("model_type", ["recurrent_gemma"])
def test_state_kept_on_modules_is_kept_per_slot(model_type):
    model, ids_BT = looped(model_type)
    plain = loopwise.materialize(model)
    for _ in range(2):  # nothing may stay from one generation to the next
        want = generate(plain, ids_BT, output_logits=True, return_dict_in_generate=True)
        got = generate(model, ids_BT, output_logits=True, return_dict_in_generate=True)
        assert torch.equal(got.sequences, want.sequences)
        assert_close(torch.stack(got.logits), torch.stack(want.logits), "logits")
    loopwise.set_loops(model, 1)
    assert torch.equal(generate(model, ids_BT), generate(loopwise.detach(model), ids_BT))


@pytest.mark.parametrize("model_type", ["llama", "recurrent_gemma", "mamba2"])
def test_two_caches_may_take_turns(model_type):
    """State on modules is banked on the cache, so that two sequences do not mix (in plain RecurrentGemma they do)."""
    model, ids_BT = looped(model_type)
    name = "cache_params" if model_type == "mamba2" else "past_key_values"

    def run(order):
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        seen = [[], []]
        with torch.no_grad():
            for row in order:
                t = len(seen[row])
                if t == 0:
                    piece, positions = ids_BT[row : row + 1, :4], torch.arange(4)
                else:
                    piece, positions = ids_BT[row : row + 1, 3 + t : 4 + t], torch.arange(3 + t, 4 + t)
                extra = {} if model_type == "mamba2" else {"position_ids": positions[None]}
                output = model(piece, use_cache=True, **{name: caches[row]}, **extra)
                seen[row].append(output.logits[:, -1])
        return [torch.cat(part) for part in seen]

    apart, mixed = run([0] * 5 + [1] * 5), run([0, 1] * 5)
    for row in (0, 1):
        assert_close(mixed[row], apart[row], f"sequence {row}")


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_next"])
def test_a_generation_can_be_continued(model_type):
    model, ids_BT = looped(model_type)
    want = generate(model, ids_BT, max_new_tokens=10)
    first = generate(model, ids_BT, max_new_tokens=4, return_dict_in_generate=True)
    tokens = first.sequences
    got = generate(model, tokens, max_new_tokens=6, past_key_values=first.past_key_values)
    assert torch.equal(got, want)


def test_generation_from_one_token():
    model, ids_BT = looped("llama")
    assert_as_unrolled(model, ids_BT[:, :1])
    assert_as_unrolled(model, ids_BT[:, :1], cache_implementation="static", disable_compile=True)
