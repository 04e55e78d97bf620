"""ALBERT: parity with transformers, on the golden and on random models of other shapes; export; training.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForMaskedLM, AlbertForPreTraining

import loopwise
from loopwise.checkpoints.albert import ALBERT, plan_text
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.models.encoder import LoopwiseEncoder, LoopwiseEncoderConfig
from tests.checkpoints.foreign import (
    GOLDENS,
    REMOVED,
    assert_round_trip,
    config_of,
    random_checkpoint,
    spoiled,
    tensors_of,
)

GOLDEN = GOLDENS / "albert"
ATOL = 2e-5
EXPECTED = tensors_of(GOLDEN, "expected")
INPUTS = tensors_of(GOLDEN, "inputs")
UNMASKED = {name: INPUTS[name] for name in ("input_ids", "token_type_ids")}
LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"


@pytest.fixture
def model():
    return import_checkpoint(GOLDEN)


def assert_golden(got, name):
    torch.testing.assert_close(got, EXPECTED[name], atol=ATOL, rtol=0)


def native(tmp_path, kind=AlbertForPreTraining, **fields):
    """A random model of transformers in a folder, with every parameter away from its start."""
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 40,
        "embedding_size": 12,
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_attention_heads": 3,
    }
    sizes |= {"max_position_embeddings": 16, "num_hidden_layers": 5, "num_hidden_groups": 2, "hidden_dropout_prob": 0.0}
    config = AlbertConfig(**(sizes | {"attention_probs_dropout_prob": 0.0} | fields))
    theirs = kind(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "native")
    return theirs, tmp_path / "native"


@torch.no_grad()
def test_every_output_equals_the_reference(model):
    assert str(loopwise.plan_of(model)) == "group0:(0)x3 group1:(1)x3"
    output = model(**UNMASKED, output_hidden_states=True)
    assert_golden(output.prediction_logits, "prediction_logits")
    assert_golden(output.sop_logits, "sop_logits")
    assert_golden(torch.stack(output.hidden_states), "hidden_states")
    states = model(**UNMASKED, output_loops="group1").loop_states
    torch.testing.assert_close(torch.stack(states), EXPECTED["hidden_states"][4:], atol=ATOL, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_not_seen(model, attention):
    model.set_attn_implementation(attention)
    output, real_BT = model(**INPUTS), INPUTS["attention_mask"].bool()
    want = EXPECTED["prediction_logits_masked"]
    torch.testing.assert_close(output.prediction_logits[real_BT], want[real_BT], atol=ATOL, rtol=0)
    assert_golden(output.sop_logits, "sop_logits_masked")
    other = INPUTS | {"input_ids": torch.where(real_BT, INPUTS["input_ids"], 7)}
    torch.testing.assert_close(model(**other).prediction_logits[real_BT], output.prediction_logits[real_BT])


@torch.no_grad()
def test_depth_is_changed_by_name(model):
    shallow = model(**UNMASKED, loops={"group1": 1}, output_hidden_states=True)
    torch.testing.assert_close(torch.stack(shallow.hidden_states), EXPECTED["hidden_states"][:5], atol=ATOL, rtol=0)
    loopwise.set_loops(model, group0=2, group1=1)
    assert len(model(**UNMASKED, output_hidden_states=True).hidden_states) == 4


def test_round_trip(tmp_path):
    model, again = assert_round_trip(GOLDEN, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(**UNMASKED).prediction_logits, model(**UNMASKED).prediction_logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_hidden_groups": 1, "hidden_act": "gelu"},
        {"inner_group_num": 2, "num_hidden_groups": 3, "num_hidden_layers": 7, "hidden_act": "relu"},
        {"embedding_size": 24, "type_vocab_size": 3, "layer_norm_eps": 1e-5},
    ],
)
def test_other_shapes_equal_transformers(tmp_path, fields):
    theirs, folder = native(tmp_path, **fields)
    model = import_checkpoint(folder)
    generator = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(0, 40, (3, 9), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 6:] = 0
    types_BT = torch.randint(0, 2, (3, 9), generator=generator)
    want = theirs(ids_BT, attention_mask=mask_BT, token_type_ids=types_BT, output_hidden_states=True)
    got = model(ids_BT, attention_mask=mask_BT, token_type_ids=types_BT, output_hidden_states=True)
    assert len(got.hidden_states) == 1 + theirs.config.num_hidden_layers * theirs.config.inner_group_num
    real_BT = mask_BT.bool()
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a[real_BT], b[real_BT], atol=ATOL, rtol=1e-5)
    torch.testing.assert_close(got.prediction_logits[real_BT], want.prediction_logits[real_BT], atol=ATOL, rtol=1e-5)
    torch.testing.assert_close(got.sop_logits, want.sop_logits, atol=ATOL, rtol=1e-5)
    assert_round_trip(folder, tmp_path)


@torch.no_grad()
def test_a_checkpoint_with_the_masked_head_alone(tmp_path):
    theirs, folder = native(tmp_path, kind=AlbertForMaskedLM)
    model = import_checkpoint(folder)
    ids_BT = torch.arange(18).view(2, 9)
    output = model(ids_BT)
    torch.testing.assert_close(output.prediction_logits, theirs(ids_BT).logits, atol=ATOL, rtol=1e-5)
    assert output.sop_logits is None and output.pooler_output is None
    with pytest.raises(ValueError, match="sentence_order_label were given"):
        model(ids_BT, sentence_order_label=torch.zeros(2, dtype=torch.long))
    assert_round_trip(folder, tmp_path)


def test_losses_and_gradients_equal_transformers(tmp_path):
    theirs, folder = native(tmp_path)
    model = import_checkpoint(folder)
    ids_BT, order_B = torch.arange(18).view(2, 9), torch.tensor([0, 1])
    labels_BT = torch.where(ids_BT % 3 == 0, ids_BT, -100)
    loss = model(ids_BT, labels=labels_BT, sentence_order_label=order_B).loss
    want = theirs(ids_BT, labels=labels_BT, sentence_order_label=order_B).loss
    torch.testing.assert_close(loss, want, atol=ATOL, rtol=1e-5)
    loss.backward()
    want.backward()
    pairs = {
        "embeddings.tokens.weight": "albert.embeddings.word_embeddings.weight",
        "model.layers.0.mixer.v_proj.weight": f"{LAYER}.attention.value.weight",
        "model.layers.0.mlp_norm_out.bias": f"{LAYER}.full_layer_layer_norm.bias",
        "order_head.weight": "sop_classifier.classifier.weight",
    }
    theirs_by_name = dict(theirs.named_parameters())
    for ours, name in pairs.items():
        got = model.get_parameter(ours).grad
        torch.testing.assert_close(got, theirs_by_name[name].grad, atol=ATOL, rtol=1e-4)


def test_it_trains(model):
    """The shared layers learn: a few steps on one batch lower the loss of both heads."""
    model.train()
    labels_BT = torch.where(INPUTS["input_ids"] % 2 == 0, INPUTS["input_ids"], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(**INPUTS, labels=labels_BT, sentence_order_label=torch.tensor([0, 1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_gradient_of_a_group_is_the_sum_over_its_layers(model):
    """Law 2 on the encoder: the same model with every visit's layer of its own."""
    loss = model(**UNMASKED).prediction_logits.square().mean()
    loss.backward()
    config = LoopwiseEncoderConfig(**(model.config.to_dict() | {"plan": "0-5", "num_hidden_layers": 6, "loops": None}))
    unrolled = LoopwiseEncoder(config).eval()
    state = model.state_dict()
    copies = {
        name.replace("model.layers.0", f"model.layers.{i}"): state[
            name.replace("model.layers.0", f"model.layers.{i // 3}")
        ]
        for name in state
        if name.startswith("model.layers.0.")
        for i in range(6)
    }
    unrolled.load_state_dict({n: t for n, t in state.items() if not n.startswith("model.layers.")} | copies)
    unrolled(**UNMASKED).prediction_logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.") and "k_proj.bias" not in name:
            group, rest = name.removeprefix("model.layers.").split(".", 1)
            parts = [unrolled.get_parameter(f"model.layers.{3 * int(group) + i}.{rest}").grad for i in range(3)]
            torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "groups", "inner", "plan"),
    [
        (12, 1, 1, "core:(0)x12"),
        (6, 2, 1, "group0:(0)x3 group1:(1)x3"),
        (5, 2, 1, "group0:(0)x3 group1:(1)x2"),
        (7, 3, 2, "group0:(0-1)x3 group1:(2-3)x2 group2:(4-5)x2"),
    ],
)
def test_plans(layers, groups, inner, plan):
    config = {"num_hidden_layers": layers, "num_hidden_groups": groups, "inner_group_num": inner}
    assert plan_text(config) == plan
    order = [int(i / (layers / groups)) * inner + j for i in range(layers) for j in range(inner)]
    assert list(loopwise.Plan.parse(plan).layers) == order


def test_a_random_checkpoint_of_another_shape(tmp_path):
    config = config_of(GOLDEN) | {
        "hidden_size": 20,
        "num_attention_heads": 5,
        "embedding_size": 8,
        "inner_group_num": 2,
    }
    assert_round_trip(random_checkpoint(ALBERT, config, tmp_path / "random"), tmp_path)


def test_a_buffer_of_older_files_is_taken_and_given_back(tmp_path):
    folder = spoiled("albert", tmp_path / "old", tensors={"albert.embeddings.position_ids": torch.arange(32)[None]})
    export_checkpoint(import_checkpoint(folder), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")["albert.embeddings.position_ids"]
    assert torch.equal(got, torch.arange(32)[None])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}.ffn.bias": REMOVED}, f"lacks tensor {LAYER}.ffn.bias"),
        ({"albert.pooler.weight": REMOVED}, "lacks tensor albert.pooler.weight"),
        ({"classifier.weight": torch.zeros(2, 32)}, "does not know: classifier.weight"),
        ({f"{LAYER}.ffn.bias": torch.zeros(3)}, r"ffn.bias has shape \[3\]"),
        ({"predictions.decoder.weight": torch.zeros(83, 20)}, "predictions.decoder.weight must be tied"),
    ],
)
def test_the_first_wrong_tensor_is_named(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message) as error:
        import_checkpoint(spoiled("albert", tmp_path / "spoiled", tensors=tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"num_hidden_groups": 0}, "num_hidden_groups=0"),
        ({"num_hidden_groups": 7}, "num_hidden_groups=7"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"embedding_size": REMOVED}, "embedding_size"),
    ],
)
def test_unsupported_values_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        import_checkpoint(spoiled("albert", tmp_path / "spoiled", config=fields))
    assert "\n" not in str(error.value)


def test_encoders_that_do_not_fit_are_refused(model):
    def changed(**fields):
        return LoopwiseEncoder(LoopwiseEncoderConfig(**(model.config.to_dict() | fields)))

    with pytest.raises(ValueError, match="heads has 'words'"):
        changed(heads=["words"])
    with pytest.raises(ValueError, match="pools=false"):
        changed(pools=False)
    with pytest.raises(ValueError, match="embedding_size is 0"):
        changed(embedding_size=0)
    causal = [block | {"mixer": block["mixer"] | {"mask": "causal"}} for block in model.config.blocks]
    with pytest.raises(ValueError, match="mask 'causal'"):
        changed(blocks=causal)
    with pytest.raises(ValueError, match="num_positions=32"):
        model(torch.zeros(1, 33, dtype=torch.long))


@torch.no_grad()
def test_the_order_head_reads_the_pooled_first_token(model):
    output = model(**UNMASKED)
    pooled = torch.tanh(F.linear(EXPECTED["hidden_states"][-1][:, 0], model.pooler.weight, model.pooler.bias))
    torch.testing.assert_close(output.pooler_output, pooled, atol=ATOL, rtol=0)
