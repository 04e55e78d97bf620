"""Attention inside blocks: masks, caches, the choice of function, and the two styles of rotation."""

import dataclasses
import shutil

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from loopwise.models.attention import attention_mask
from loopwise.models.blocks import Block, BlockConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.models.norms import NormConfig
from loopwise.models.rotary import RotaryConfig, half_split_order, rotary_tables, rotate
from tests.models import naive_blocks
from tests.models.block_families import FAMILIES, HALF, WIDTH, build, extras, model_config, noise, tables

TOKENS = 6
# Kernels that see other shapes round differently; the states are of size 1 to 10.
CLOSE = {"atol": 5e-6, "rtol": 5e-6}
WINDOW = BlockConfig(
    hidden_size=WIDTH,
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, rope=HALF, sliding_window=3),
    mlp=MLPConfig(intermediate_size=11),
)
CACHED = {
    name: config for name, config in FAMILIES.items() if getattr(config.mixer, "mask", "") in ("causal", "prefix")
}
CACHED["window"] = WINDOW


def parts_of(blocks: list[Block], hidden: torch.Tensor, cache: Cache, lengths: list[int], prefix=None) -> torch.Tensor:
    """Blocks fed a few tokens at a time, with the masks and tables that a model would make."""
    config, found, start = blocks[0].block_config, [], 0
    more = extras(config, tokens=TOKENS)
    for length in lengths:
        here = slice(start, start + length)
        positions = torch.arange(start, start + length)[None]
        part = {key: value[:, here] if key == "value_embeddings" else value for key, value in more.items()}
        part |= tables(config, positions)
        part_of_prefix = None if prefix is None else prefix[:, here]
        state, like = hidden[:, here], blocks[0].mixer.config
        mask = attention_mask(config.mixer, like, state, None, cache, positions, part_of_prefix)
        for block in blocks:
            state = block(state, mask, positions, cache, True, **part)
        found.append(state)
        start += length
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[1] * TOKENS, [3, 2, 1]], ids=str)
@pytest.mark.parametrize("name", CACHED)
def test_cached_equals_uncached(name: str, lengths: list[int], implementation: str) -> None:
    config = CACHED[name]
    blocks = [build(config, implementation, seed=i, layer_idx=i) for i in range(2)]
    hidden = noise(2, TOKENS, WIDTH, seed=7)
    whole = hidden
    for block in blocks:
        whole = block(whole, **tables(config, TOKENS), **extras(config, tokens=TOKENS))
    for cache in (DynamicCache(), static_cache(config)):
        torch.testing.assert_close(parts_of(blocks, hidden, cache, lengths), whole, **CLOSE)
        assert [cache.get_seq_length(i) for i in range(2)] == [TOKENS, TOKENS]


def static_cache(config: BlockConfig) -> StaticCache:
    like = model_config()
    like.num_attention_heads = config.mixer.num_heads  # type: ignore[attr-defined]
    like.num_key_value_heads = config.mixer.num_kv_heads or config.mixer.num_heads  # type: ignore[attr-defined]
    like.hidden_size = config.hidden_size  # type: ignore[attr-defined]
    return StaticCache(config=like, max_cache_len=TOKENS + 3)


def test_a_prefix_in_the_first_call_is_cached() -> None:
    config = FAMILIES["hrm_text"]
    block, hidden = build(config), noise(2, TOKENS, WIDTH)
    prefix = torch.arange(TOKENS).expand(2, -1) < torch.tensor([[3], [2]])
    mask = attention_mask(config.mixer, block.mixer.config, hidden, prefix_BT=prefix)
    whole = block(hidden, mask, **tables(config, TOKENS))
    again = parts_of([block], hidden, DynamicCache(), [4, 1, 1], prefix)
    torch.testing.assert_close(again, whole, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional", "prefix"])
def test_masks_with_padding_equal_the_written_out_ones(kind: str, implementation: str) -> None:
    name = {"causal": "retrofit_llama", "bidirectional": "hrm", "prefix": "hrm_text"}.get(kind)
    config = FAMILIES[name] if name else WINDOW
    block = build(config, implementation).double()
    hidden = noise(2, TOKENS, WIDTH).double()
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    padding[1, :2] = False
    prefix = (torch.arange(TOKENS) < 4) & padding

    def seen(row: int, query: int, key: int) -> bool:
        visible = {
            "causal": key <= query,
            "window": query - 3 < key <= query,
            "bidirectional": True,
            "prefix": key <= query or bool(prefix[row, query] and prefix[row, key]),
        }[kind]
        return (
            visible and bool(padding[row, key]) or key == query
        )  # rows of padding see themselves, and are not compared

    mask = attention_mask(
        config.mixer, block.mixer.config, hidden, padding, prefix_BT=prefix if kind == "prefix" else None
    )
    result = block(hidden, mask, **tables(config, TOKENS))
    expected = naive_blocks.block(hidden, config, dict(block.named_parameters()), seen)
    torch.testing.assert_close(result[padding], expected[padding], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["huginn", "parcae", "window"])
def test_left_padding_changes_nothing(name: str) -> None:
    config = CACHED[name]
    block, pad = build(config), 2
    hidden = noise(2, TOKENS, WIDTH)
    more = extras(config, tokens=TOKENS)
    alone = {key: value[1:, pad:] for key, value in more.items()}
    expected = block(hidden[1:, pad:], **tables(config, TOKENS - pad), **alone)
    padding = torch.ones(2, TOKENS, dtype=torch.bool)
    padding[1, :pad] = False
    positions = (padding.long().cumsum(-1) - 1).clamp(min=0)
    mask = attention_mask(config.mixer, block.mixer.config, hidden, padding)
    result = block(hidden, mask, **tables(config, positions), **more)
    torch.testing.assert_close(result[1:, pad:], expected, **CLOSE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [FAMILIES["ouro"], WINDOW], ids=["causal", "window"])
def test_no_mask_means_the_configured_one(config: BlockConfig, implementation: str) -> None:
    block, hidden = build(config, implementation), noise(2, TOKENS, WIDTH)
    mask = attention_mask(config.mixer, block.mixer.config, hidden, torch.ones(2, TOKENS))
    torch.testing.assert_close(
        block(hidden, None, **tables(config, TOKENS)), block(hidden, mask, **tables(config, TOKENS)), **CLOSE
    )


def test_the_attention_function_can_be_switched_on_the_model() -> None:
    block, hidden = build(FAMILIES["ouro"]), noise(2, TOKENS, WIDTH)
    block.mixer.config._attn_implementation = "eager"
    position_embeddings = tables(FAMILIES["ouro"], TOKENS)["position_embeddings"]
    _, weights = block.mixer(hidden, position_embeddings=position_embeddings)
    assert weights is not None and weights.shape == (2, 4, TOKENS, TOKENS)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, TOKENS))
    assert (weights.triu(1) == 0).all()
    block.mixer.config._attn_implementation = "sdpa"
    assert block.mixer(hidden, position_embeddings=position_embeddings)[1] is None


def test_flex_attention_without_its_mask_is_refused() -> None:
    block = build(FAMILIES["ouro"], "flex_attention")
    with pytest.raises(ValueError, match="flex_attention needs an attention_mask"):
        block(noise(2, TOKENS, WIDTH), **tables(FAMILIES["ouro"], TOKENS))


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="flex compiles for the CPU")
def test_flex_attention_equals_sdpa() -> None:
    config, results = FAMILIES["hrm_text"], []
    config = dataclasses.replace(config, mixer=dataclasses.replace(config.mixer, num_kv_heads=2))
    hidden, prefix = noise(2, TOKENS, WIDTH), torch.arange(TOKENS).expand(2, -1) < 3
    for implementation in ("sdpa", "flex_attention"):
        block = build(config, implementation)
        mask = attention_mask(config.mixer, block.mixer.config, hidden, prefix_BT=prefix)
        with torch.no_grad():
            results.append(block(hidden, mask, **tables(config, TOKENS)))
    torch.testing.assert_close(*results, **CLOSE)


def test_prefix_tokens_for_another_mask_are_refused() -> None:
    hidden, prefix = noise(2, TOKENS, WIDTH), torch.ones(2, TOKENS)
    with pytest.raises(ValueError, match="mask is 'causal': use mask 'prefix'"):
        attention_mask(FAMILIES["ouro"].mixer, model_config(), hidden, prefix_BT=prefix)
    with pytest.raises(ValueError, match="mask 'prefix' is not available with flash attention"):
        attention_mask(FAMILIES["hrm_text"].mixer, model_config("flash_attention_2"), hidden, prefix_BT=prefix)


def test_repeated_kv_heads_equal_grouped_ones() -> None:
    grouped = FAMILIES["retrofit_llama"]
    full = dataclasses.replace(grouped, mixer=dataclasses.replace(grouped.mixer, num_kv_heads=None))
    ours, many = build(grouped).double(), build(full).double()
    state = ours.state_dict()
    for name in ("mixer.k_proj.weight", "mixer.v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(state)
    hidden = noise(2, TOKENS, WIDTH).double()
    torch.testing.assert_close(ours(hidden, **tables(grouped, TOKENS)), many(hidden, **tables(full, TOKENS)))


def test_permuted_rows_turn_one_style_of_rotation_into_the_other() -> None:
    pairs = FAMILIES["huginn"]
    rope = dataclasses.replace(pairs.mixer.rope, style="half")
    half = dataclasses.replace(pairs, mixer=dataclasses.replace(pairs.mixer, rope=rope))
    first, second = build(pairs).double(), build(half).double()
    state, order = first.state_dict(), half_split_order(4)
    for name in ("mixer.q_proj.weight", "mixer.k_proj.weight"):
        state[name] = state[name].unflatten(0, (4, 4))[:, order].flatten(0, 1)
    state["mixer.qk_bias"] = state["mixer.qk_bias"][..., order]
    second.load_state_dict(state)
    hidden = noise(2, TOKENS, WIDTH).double()
    torch.testing.assert_close(first(hidden, **tables(pairs, TOKENS)), second(hidden, **tables(half, TOKENS)))
    assert torch.equal(order[order.argsort()], torch.arange(4))
    assert order.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotation_is_a_complex_product_on_the_first_channels(style: str) -> None:
    config = RotaryConfig(dim=6, theta=100.0, style=style)
    positions = torch.tensor([[0, 3, 4], [1, 2, 9]])
    heads = noise(2, 5, 3, 8)
    result = rotate(heads, *rotary_tables(positions, config), config)
    assert torch.equal(result[..., 6:], heads[..., 6:])
    turned = heads[..., :6]
    real, imaginary = turned.chunk(2, -1) if style == "half" else (turned[..., ::2], turned[..., 1::2])
    angles = positions[:, None, :, None] * 100.0 ** (-torch.arange(3) / 3)
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    joined = (product.real, product.imag)
    expected = torch.cat(joined, -1) if style == "half" else torch.stack(joined, -1).flatten(-2)
    torch.testing.assert_close(result[..., :6], expected, **CLOSE)
    low = rotate(heads.bfloat16(), *rotary_tables(positions, config), config)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), result, atol=0.05, rtol=0.02)


def test_scores_depend_on_distances_only() -> None:
    config = FAMILIES["ouro"]
    block, hidden = build(config), noise(1, TOKENS, WIDTH)
    near = block(hidden, **tables(config, TOKENS))
    far = block(hidden, **tables(config, torch.arange(TOKENS)[None] + 100))
    torch.testing.assert_close(near, far, atol=1e-4, rtol=0)


def test_a_later_token_reaches_no_earlier_one() -> None:
    for name, config in CACHED.items():
        block, hidden = build(config), noise(2, TOKENS, WIDTH)
        changed = hidden.clone()
        changed[:, -1] += 1
        more = tables(config, TOKENS) | extras(config, tokens=TOKENS)
        assert torch.equal(block(hidden, **more)[:, :-1], block(changed, **more)[:, :-1]), name


def test_weightless_norms_have_no_parameters() -> None:
    assert list(NormConfig(weight=False).build(4).parameters()) == []
    assert [n for n, _ in build(FAMILIES["hrm"]).named_parameters() if "norm" in n] == []
