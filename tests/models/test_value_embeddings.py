"""Value embeddings: which layers read their table, and what is refused. Shapes: B rows, T tokens."""

import pytest
import torch

from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig


def block(gate, kv_heads=2):
    mixer = AttentionConfig(num_heads=4, num_kv_heads=kv_heads, value_gate_channels=gate)
    return BlockConfig(hidden_size=16, mixer=mixer, mlp=MLPConfig(intermediate_size=8))


def build(gates, tables, **fields):
    config = LoopwiseDecoderConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=len(gates),
        blocks=[block(gate).to_dict() for gate in gates],
        plan=f"core:(0-{len(gates) - 1})x2",
        norm={},
        value_embeddings=tables,
        **fields,
    )
    torch.manual_seed(0)
    return LoopwiseForCausalLM(config).eval()


def test_a_table_is_read_through_a_gate_only_and_at_every_visit():
    model = build([4, None, 4], {"0": 8, "1": 5})
    assert model.model.value_embeddings.read == [0]
    ids_BT = torch.tensor([[1, 2, 3]])
    looked_up = model.model.value_embeddings.look_up(ids_BT)
    assert list(looked_up) == [0] and looked_up[0].shape == (1, 3, 8)
    seen = []
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _, __, kwargs, i=i: seen.append((i, kwargs.get("value_embeddings"))), with_kwargs=True
        )
    model(ids_BT)
    assert [i for i, _ in seen] == [0, 1, 2] * 2
    assert [value is not None for _, value in seen] == [True, False, False] * 2
    assert all(torch.equal(value, looked_up[0]) for _, value in seen if value is not None)


def test_cached_decoding_looks_up_new_tokens():
    model = build([4, 4], {"0": 8, "1": 8})
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad():
        for table in model.model.value_embeddings.values():
            table.weight.mul_(100)  # the start of all embeddings is small
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :1]).past_key_values
        rest = model(ids[:, 1:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 1:])


@pytest.mark.parametrize(
    ("tables", "message"),
    [({"2": 8}, "names layer '2'"), ({"x": 8}, "names layer 'x'"), ({"0": 16}, "width 16, the layer's values have 8")],
)
def test_tables_that_do_not_fit_are_refused(tables, message):
    with pytest.raises(ValueError, match=message):
        build([4, 4], tables)


def test_embeddings_in_the_place_of_tokens():
    hidden = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="pass input_ids"):
        build([4], {"0": 8})(inputs_embeds=hidden)
    assert build([None], {"0": 8})(inputs_embeds=hidden).logits.shape == (1, 2, 11)
