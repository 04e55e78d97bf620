"""Weight similarity: the cosines against a naive oracle, the chance level against shuffled tensors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn

from loopwise.measure import similarity
from loopwise.measure.similarity import weight_similarity
from loopwise.models.hub import layer_list


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return (a @ b / (a.norm() * b.norm())).item()


def tensors(num_layers: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {"model.embed.weight": torch.zeros(3)}
    for layer in range(num_layers):
        made[f"model.layers.{layer}.mlp.up.weight"] = torch.randn(40, 30, generator=generator)
        made[f"model.layers.{layer}.norm.weight"] = 1 + 0.3 * torch.randn(50, generator=generator)
    return made


# Dense, biased and transposed, experts, state space, hybrids of several layer types, sandwich norms.
TYPES = "llama gpt2 mixtral mamba2 jamba qwen3_next gemma3_text deepseek_v3 bamba falcon_h1".split()


@pytest.mark.parametrize("model_type", TYPES)
def test_cosines_are_those_of_the_layers_tensors(model_type: str) -> None:
    model = tiny_model(model_type)
    found = weight_similarity(model)
    layers = [dict(layer.named_parameters()) for layer in layer_list(model).layers]
    shared = {name for one in layers for name in one if sum(name in other for other in layers) > 1}
    plain = {name for name in shared if "experts." not in name or not any(c.isdigit() for c in name)}
    assert plain <= {group.name for group in found.groups}
    for name in plain:
        got = found[name].compare().cosine
        for i, one in enumerate(layers):
            for j, other in enumerate(layers):
                if name not in one or name not in other or one[name].shape != other[name].shape:
                    assert math.isnan(got[i, j]), (name, i, j)
                elif one[name].norm() > 0 and other[name].norm() > 0:
                    assert got[i, j] == pytest.approx(cosine(one[name], other[name]), abs=1e-9), (name, i, j)


def test_a_mapping_gives_what_the_model_gives() -> None:
    model = tiny_model("jamba")
    want, got = weight_similarity(model), weight_similarity(model.state_dict())
    # Buffers are in a state dict too.
    assert {group.name for group in want.groups} <= {group.name for group in got.groups}
    for group in want.groups:
        np.testing.assert_array_equal(group.dots, got[group.name].dots)
    listed = weight_similarity(layer_list(model).layers)
    np.testing.assert_array_equal(want.mean().cosine, listed.mean().cosine)


@pytest.mark.parametrize("name", ["mlp.up.weight", "norm.weight"])
def test_chance_is_what_shuffled_tensors_give(name: str) -> None:
    made = tensors()
    group = weight_similarity(made)[name].compare()
    one, other = (made[f"model.layers.{layer}.{name}"].flatten() for layer in (1, 4))
    generator = torch.Generator().manual_seed(1)
    shuffled = [cosine(one, other[torch.randperm(len(other), generator=generator)]) for _ in range(3000)]
    mean, std = float(np.mean(shuffled)), float(np.std(shuffled))
    assert group.chance[1, 4] == pytest.approx(mean, abs=4 * std / math.sqrt(3000))
    assert group.chance_std[1, 4] == pytest.approx(std, rel=0.06)


def test_chance_of_independent_layers() -> None:
    found = weight_similarity(tensors(num_layers=12))
    matrix, norm = found["mlp.up.weight"], found["norm.weight"]
    apart = ~np.eye(12, dtype=bool)
    assert matrix.is_matrix and not norm.is_matrix
    assert np.allclose(matrix.compare().chance_std[apart], 1 / math.sqrt(1200), rtol=0.1)
    assert abs(matrix.compare().chance[apart]).max() < 0.01
    assert norm.compare().chance[apart].min() > 0.8  # norms lie around 1: a cosine of 0.9 means nothing
    for group in (matrix.compare(), norm.compare()):
        z = ((group.cosine - group.chance) / group.chance_std)[np.triu_indices(12, 1)]
        assert 0.6 < np.sqrt((z**2).mean()) < 1.5


def test_blocks_are_concatenated_layers() -> None:
    made = tensors(num_layers=6)
    found = weight_similarity(made)
    for name in ("mlp.up.weight", "norm.weight"):
        flat = [made[f"model.layers.{layer}.{name}"].flatten() for layer in range(6)]
        for b in (1, 2, 3):
            blocks = [torch.cat(flat[start : start + b]) for start in range(0, 6, b)]
            want = [[cosine(one, other) for other in blocks] for one in blocks]
            np.testing.assert_allclose(found[name].compare(b).cosine, want, atol=1e-12)
    with pytest.raises(ValueError, match="b=4 layers do not divide 6"):
        found["norm.weight"].compare(4)


def test_a_grown_model_shows_its_copies() -> None:
    made = tensors(num_layers=3)
    for layer in range(3):
        for name in ("mlp.up.weight", "norm.weight"):
            made[f"model.layers.{layer + 3}.{name}"] = made[f"model.layers.{layer}.{name}"].clone()
    found = weight_similarity(made)
    assert found.lag(3) == {"mlp.up.weight": pytest.approx(1, abs=1e-12), "norm.weight": pytest.approx(1, abs=1e-12)}
    assert abs(found.lag(1)["mlp.up.weight"]) < 0.1
    # R(k) averages over all L - k pairs at that distance.
    cos = found["norm.weight"].compare().cosine
    assert found.lag(4)["norm.weight"] == pytest.approx((cos[0, 4] + cos[1, 5]) / 2)
    assert found.mean().lag(3) == pytest.approx(1)
    assert np.allclose(found.mean(3).cosine, 1)
    assert math.isnan(found.mean().lag(6))


def test_pieces_and_types_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: tensor.to(torch.bfloat16) for name, tensor in tensors().items()}
    whole = weight_similarity(made).mean().cosine
    monkeypatch.setattr(similarity, "CHUNK", 42)
    np.testing.assert_allclose(weight_similarity(made).mean().cosine, whole, atol=1e-12)
    up = [made[f"model.layers.{layer}.mlp.up.weight"] for layer in (0, 5)]
    assert whole[0, 5] == pytest.approx(cosine(*up), abs=1e-12)


def test_experts_are_one_group() -> None:
    made = {
        f"layers.{layer}.mlp.experts.{expert}.up.weight": torch.randn(4, 3)
        for layer in range(2)
        for expert in range(11)
    }
    found = weight_similarity(made)
    assert [group.name for group in found.groups] == ["mlp.experts.*.up.weight"]
    one, other = (
        torch.cat([made[f"layers.{layer}.mlp.experts.{e}.up.weight"].flatten() for e in range(11)]) for layer in (0, 1)
    )
    assert found.groups[0].compare().cosine[0, 1] == pytest.approx(cosine(one, other))


def test_the_layers_are_where_most_tensors_are() -> None:
    made = tensors() | {f"vision.blocks.{layer}.weight": torch.randn(3) for layer in range(9)}
    assert weight_similarity(made).num_layers == 6
    assert weight_similarity(made, path="vision.blocks").num_layers == 9
    assert [g.name for g in weight_similarity(made, select=lambda name: "norm" in name).groups] == ["norm.weight"]


def test_json_has_no_nan() -> None:
    found = weight_similarity(tiny_model("jamba"))
    text = json.dumps(found.to_json(b=2), allow_nan=False)
    read = json.loads(text)
    assert read["num_layers"] == 6 and read["blocks"]["b"] == 2
    assert any(None in row for group in read["groups"].values() for row in group["cosine"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"wte.weight": torch.zeros(2)}, "no tensor is named PATH.NUMBER.NAME"),
        ({}, "there are none"),
        ({"h.0.w": torch.zeros(2, dtype=torch.int8), "h.1.w": torch.zeros(2, dtype=torch.int8)}, "dequantise"),
        ([nn.Linear(2, 2, device="meta")] * 2, "meta device"),
        (nn.Linear(2, 2), "contains no transformers model"),
    ],
)
def test_what_cannot_be_compared(source, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_similarity(source)
