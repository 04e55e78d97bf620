"""Edits of our own decoder in memory: its plan, loops, value embeddings and offsets are parts of the model."""

from __future__ import annotations

import pytest
import torch

import loopwise
from loopwise.edit.apply import apply
from loopwise.models.relaxation import add_relaxation
from tests.edit import decoders
from tests.edit.decoders import block, decoder, ids_of


def same_tensors(one, two):
    """Whether two models have the same tensors bit for bit under the same names."""
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def own(plan="0 core:(1-2)x2 3", **fields):
    blocks = [block(value_gate_channels=4), block(), block("branch", value_gate_channels=4), block("branch_out")]
    return decoder(blocks, plan, value_embeddings={"0": 16, "2": 16}, tie_word_embeddings=True, **fields)


def test_our_own_decoder_in_three_realisations():
    ids_BT = ids_of(own())
    alias, tied, plain = (apply(own(), "repeat(3, 5)", mode=mode) for mode in ("alias", "tie", "materialize"))
    assert str(loopwise.plan_of(alias)) == alias.config.plan == "0-2 (1-2)x2 3"
    want = decoders.logits(alias, ids_BT)
    assert torch.equal(decoders.logits(tied, ids_BT), want)
    torch.testing.assert_close(decoders.logits(plain, ids_BT), want, rtol=1e-5, atol=1e-5)
    assert str(loopwise.plan_of(plain)) == "0-7" and plain.config.num_hidden_layers == len(plain.config.blocks) == 8
    assert sorted(plain.config.value_embeddings) == ["0", "2", "4", "6"]
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    again = apply(apply(own(), "untie"), 'tie("0 core:(1-2)x2 3")')
    assert same_tensors(again, own()) and again.config.plan == "0 core:(1-2)x2 3"


def test_zeroed_layers_of_our_own_decoder_are_the_identity():
    model = apply(own(), "untie")
    ids_BT = ids_of(model)
    new = apply(model, "llama_pro(every=1)")
    assert torch.equal(decoders.logits(new, ids_BT), decoders.logits(model, ids_BT))
    assert not new.model.layers[5].mixer_norm_out.bias.any(), "the norm behind a branch has a bias"
    for placement in ("post", "stream"):
        stack = decoder([block(placement)] * 2, plan="0-1")
        with pytest.raises(ValueError, match=f"placement '{placement}' norms the stream itself"):
            apply(stack, "llama_pro(every=1)")


def test_loops_with_components_stay_loops():
    loops = {"core": {"update": {"kind": "update.concat"}}}
    model = own(loops=loops)
    ids_BT = ids_of(model)
    with pytest.raises(ValueError, match="components of their own"):
        apply(model, "untie")
    with pytest.raises(ValueError, match="no loop 'core', which has components"):
        apply(model, "prune([1, 2])", mode="alias")
    new = apply(model, "prune([3])", mode="tie")
    assert new.config.loops == loops and str(loopwise.plan_of(new)) == "0 core:(1-2)x2"
    update = dict(new.named_parameters())
    name = next(name for name in update if ".loops.core." in name)
    assert torch.equal(update[name], dict(model.named_parameters())[name])
    assert decoders.logits(new, ids_BT).isfinite().all()


def test_retrofit_of_our_own_decoder():
    model = apply(own(), "untie")
    ids_BT = ids_of(model)
    new = apply(model, "retrofit(1, 4, 1)")
    assert new.config.loops == {"core": {"update": {"kind": "update.concat", "init": "pass_state"}}}
    assert torch.equal(decoders.logits(new, ids_BT), decoders.logits(model, ids_BT))
    assert not torch.equal(decoders.logits(new, ids_BT, loops=2), decoders.logits(model, ids_BT))


def test_a_model_with_bare_loop_names_unties():
    model = own()
    ids_BT = ids_of(model)
    untied = apply(model, "untie")
    torch.testing.assert_close(decoders.logits(untied, ids_BT), decoders.logits(model, ids_BT), rtol=1e-5, atol=1e-5)


def test_offsets_of_our_own_decoder_go_into_the_layers_of_their_visits():
    model = own()
    add_relaxation(model, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relaxation" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ids_BT = ids_of(model)
    assert not torch.allclose(decoders.logits(model, ids_BT), decoders.logits(own(), ids_BT), atol=1e-2)
    untied = apply(model, "untie")
    assert untied.config.relaxation is None and untied.config.num_hidden_layers == 6
    torch.testing.assert_close(decoders.logits(untied, ids_BT), decoders.logits(model, ids_BT), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="offsets per visit"):
        apply(model, "prune([3])")
