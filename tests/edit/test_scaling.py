"""Folding of factors that follow the depth: the function stays, the factors are the new ones."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from loopwise.edit.apply import apply
from loopwise.edit.scaling import fold_factors
from loopwise.models.blocks import AdaLNConfig, BlockConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from tests.edit.decoders import block, decoder, ids_of, logits


def pairs(placement, scaled=False):
    """A decoder with random tensors, biases everywhere, and factors per layer."""
    norm_scales = [(n + 1) ** -0.5 if scaled else 1.0 for n in range(3)]
    blocks = [block(placement, branch_scale=0.5 / (n + 1), norm_scale=scale) for n, scale in enumerate(norm_scales)]
    return decoder(blocks, plan="core:(0-2)x2")


@pytest.mark.parametrize("placement", ["pre", "post", "stream", "branch", "branch_out"])
def test_branch_factors_fold_with_the_function_kept(placement):
    model = pairs(placement)
    ids_BT = ids_of(model)
    want = logits(model, ids_BT)
    folded = fold_factors(model, branch_scale=[1.0, 0.25, 2.0])
    assert folded is model
    assert [layer.block_config.branch_scale for layer in model.model.layers] == [1.0, 0.25, 2.0]
    assert [dict(each)["branch_scale"] for each in model.config.blocks] == [1.0, 0.25, 2.0]
    torch.testing.assert_close(logits(model, ids_BT), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "stream", "branch"])
def test_norm_factors_fold_with_the_function_kept(placement):
    model = pairs(placement, scaled=True)
    ids_BT = ids_of(model)
    want = logits(model, ids_BT)
    fold_factors(model, norm_scale=[0.3, 1.0, 0.7])
    assert [layer.block_config.norm_scale for layer in model.model.layers] == [0.3, 1.0, 0.7]
    torch.testing.assert_close(logits(model, ids_BT), want, rtol=1e-5, atol=1e-5)


def test_factors_matter_at_all():
    """Without the tensors that are rescaled, the new factors change the function."""
    model = pairs("pre")
    ids_BT = ids_of(model)
    want = logits(model, ids_BT)
    fold_factors(model, branch_scale=[1.0, 0.25, 2.0])
    for layer in model.model.layers:
        layer.block_config = block("pre", branch_scale=0.5)
    assert not torch.allclose(logits(model, ids_BT), want, atol=1e-2)


def test_growth_keeps_factors_and_folding_then_sets_those_of_the_new_depth():
    plain = decoder([block("pre", branch_scale=1 / 2, norm_scale=(n + 1) ** -0.5) for n in range(2)], plan="0-1")
    ids_BT = ids_of(plain)
    want = logits(plain, ids_BT)
    grown = apply(plain, "llama_pro(every=1)")
    assert [layer.block_config.norm_scale for layer in grown.model.layers] == [1.0, 1.0, 2**-0.5, 2**-0.5]
    assert torch.equal(logits(grown, ids_BT), want), "frozen factors keep the function"
    depths = [1, 2, 3, 4]
    fold_factors(grown, norm_scale=[depth**-0.5 for depth in depths], branch_scale=[1 / 4] * 4)
    torch.testing.assert_close(logits(grown, ids_BT), want, rtol=1e-5, atol=1e-5)
    assert [layer.block_config.branch_scale for layer in grown.model.layers] == [1 / 4] * 4


def test_folding_keeps_the_function_beside_conditioning():
    config = BlockConfig(
        hidden_size=16,
        mixer=AttentionConfig(num_heads=2),
        mlp=MLPConfig(intermediate_size=24),
        adaln=AdaLNConfig(),
        branch_scale=0.5,
    )
    model = decoder([config], plan="0")
    layer = model.model.layers[0]
    state_BTD, vector_BC = torch.randn(2, 5, 16), torch.randn(2, 16)
    with torch.no_grad():
        want = layer(state_BTD, conditioning=vector_BC)
        fold_factors(model, branch_scale=[0.2])
        torch.testing.assert_close(layer(state_BTD, conditioning=vector_BC), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fold_factors(tiny_model("llama"), branch_scale=[1.0] * 6), "keeps no factors per layer"),
        (lambda: fold_factors(pairs("pre"), branch_scale=[1.0]), "branch_scale has 1 factors, the model 3 layers"),
        (lambda: fold_factors(pairs("pre"), branch_scale=[1.0, 0.0, 1.0]), "must be above 0"),
        (lambda: fold_factors(pairs("post"), norm_scale=[0.5] * 3), "norm without a gain"),
        (
            lambda: fold_factors(decoder([block("pre", norm=NormConfig(weight=False))], plan="0"), norm_scale=[0.5]),
            "layer 0 has a norm without a gain",
        ),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert len(str(caught.value).splitlines()) == 1


def test_a_refusal_changes_nothing():
    model = decoder([block("pre"), block("pre", norm=NormConfig(weight=False))], plan="0-1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="layer 1"):
        fold_factors(model, norm_scale=[0.5, 0.5], branch_scale=[0.5, 0.5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [layer.block_config.norm_scale for layer in model.model.layers] == [1.0, 1.0]
