"""Offsets from the singular value decomposition: at the full rank the old function comes back (law 5)."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import assert_close, difference
from tiny import tiny_config, tiny_inputs, tiny_model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import loopwise
from loopwise.edit.apply import apply, plan_edit
from loopwise.edit.relax import relax, set_matrix
from loopwise.edit.surgery import Recursive
from loopwise.models.hub import layer_list
from loopwise.models.offsets import MatrixOffset
from loopwise.models.relaxation import relaxation_of
from tests.models.common import logits

# Hybrids whose tiny pattern does not divide, with one that does.
PATTERNS = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "mlp_only_layers": [],
    },
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "deepseek_v3": {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"] * 6},
}
TYPES = [
    "llama",
    "qwen2",
    "olmo2",
    "gpt2",
    "gpt_neox",
    "opt",
    "bloom",
    "falcon",
    "stablelm",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "gpt_oss",
    "mamba",
    "mamba2",
    "falcon_h1",
    "recurrent_gemma",
    "bert",
    *PATTERNS,
]


def model_of(model_type):
    if model_type not in PATTERNS:
        return tiny_model(model_type)
    config = tiny_config(model_type, extra=PATTERNS[model_type])
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and "inv_freq" not in name:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return model


@pytest.mark.parametrize("init", ["average", "lower"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_full_rank_gives_the_old_function_back(model_type, init):
    model = model_of(model_type)
    ids_BT = tiny_inputs(model)
    want = logits(model, ids_BT, use_cache=False)
    tied, full = (apply(model, Recursive(loops=2, sharing="cycle", init=init, rank=rank)) for rank in (None, -1))
    assert len(layer_list(full).layers) == 3
    assert_close(logits(full, ids_BT, use_cache=False), want, "full rank")
    assert difference(logits(tied, ids_BT, use_cache=False), want, "tied") > 1e-2


def test_the_full_rank_saved_and_unrolled(tmp_path):
    model = tiny_model("llama")
    ids_BT = tiny_inputs(model)
    full = apply(model, Recursive(loops=3, init="average", sharing="cycle", rank=-1))
    loopwise.save(full, tmp_path / "saved")
    assert torch.equal(logits(loopwise.load(tmp_path / "saved"), ids_BT), logits(full, ids_BT))
    plain = loopwise.materialize(full)
    for name, tensor in model.state_dict().items():
        assert_close(plain.state_dict()[name], tensor, name)
    assert_close(logits(plain, ids_BT), logits(model, ids_BT), "unrolled")


def test_more_rank_comes_closer():
    """Every tensor of a visit, by rank: the distance to the old layer falls to nothing."""
    model = tiny_model("gpt2")
    old = layer_list(model).layers[4].state_dict()
    errors = []
    for rank in (0, 4, 16, -1):
        new = apply(model, Recursive(loops=2, sharing="cycle", init="average", rank=rank))
        layer = layer_list(new).layers[1]
        relaxation = relaxation_of(layer)
        own = {name: tensor for name, tensor in layer.state_dict().items() if "relaxation" not in name}
        own |= {name: relaxation.of(name).applied(own[name], 1) for name in relaxation.names}
        errors.append([(own[name] - old[name]).norm().item() for name in ("mlp.c_fc.weight", "mlp.c_fc.bias")])
    matrix, bias = zip(*errors, strict=True)
    assert matrix[0] > matrix[1] > matrix[2] > 100 * matrix[3] and max(bias) < 1e-6


def test_factors_are_the_best_of_their_rank_and_the_same_every_time():
    residual = torch.randn(2, 12, 9, generator=torch.Generator().manual_seed(0))
    offset = MatrixOffset(residual.shape, 3, num_visits=2)
    set_matrix(offset, 1, residual)
    assert not offset.B[0].any()
    left, values, right = torch.linalg.svd(residual.double(), full_matrices=False)
    best = (left[..., :3] * values[:, None, :3]) @ right[:, :3]
    torch.testing.assert_close(offset.value(1).double(), best, atol=1e-5, rtol=1e-5)
    largest = offset.A[1].gather(-1, offset.A[1].abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(offset.A[1] @ offset.A[1].mT, torch.eye(3).expand(2, 3, 3), atol=1e-5, rtol=1e-5)
    transposed = MatrixOffset(torch.Size([9, 12]), 9, num_visits=1, is_transposed=True)
    set_matrix(transposed, 0, residual[0].T)
    torch.testing.assert_close(transposed.value(0), residual[0].T, atol=1e-5, rtol=1e-5)


def test_layers_of_their_own_get_no_offsets():
    model = tiny_model("llama")
    new = apply(model, Recursive(loops=2, sharing="middle_cycle", init="average", rank=2))
    assert [relaxation_of(layer) is not None for layer in layer_list(new).layers] == [False, True, True, False]


def test_bf16_weights():
    model = tiny_model("llama").to(torch.bfloat16)
    ids_BT = tiny_inputs(model)
    full = apply(model, Recursive(loops=2, sharing="cycle", init="average", rank=-1))
    assert {parameter.dtype for parameter in full.parameters()} == {torch.bfloat16}
    assert_close(logits(full, ids_BT).float(), logits(model, ids_BT).float(), "bf16", 0.1)


def test_refusals():
    model = tiny_model("llama")
    edit = plan_edit(model, Recursive(loops=2, sharing="cycle", init="average", rank=-1))
    with pytest.raises(ValueError, match="does not run the plan"):
        relax(model, copy.deepcopy(model), edit)
    with pytest.raises(ValueError, match="no relaxation"):
        relax(model, model, plan_edit(model, Recursive(loops=2, sharing="cycle")))
    new = apply(model, Recursive(loops=2, sharing="cycle", init="average"))
    with pytest.raises(ValueError, match="layer 0 cannot stand for layer 0 of the old model"):
        relax(tiny_model("qwen2"), new, edit)
    relax(model, new, edit)
    with pytest.raises(ValueError, match="materialize it first"):
        relax(new, new, edit)
    with pytest.raises(ValueError, match="the old model has 3 layers, the edit says 6"):
        relax(loopwise.detach(copy.deepcopy(new)), new, edit)
