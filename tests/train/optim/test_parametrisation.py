"""Parametrisations: the factors, the functions they make, and what they promise over depths and widths."""

import pytest
import torch
from torch import nn

from loopwise.loop.config import from_dict, to_dict
from loopwise.models.blocks import PLACEMENTS, BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.plan import Plan
from loopwise.train.optim import (
    AdamWConfig,
    CompletePParametrisation,
    LayerNormScaling,
    Multipliers,
    Parametrisation,
    StandardParametrisation,
    scale_initial_values,
    trainable,
)
from loopwise.train.optim.parametrisation import layer_depths
from tests.models.block_families import build, noise, tables

VOCAB = 17


def fields(layers: int, width: int, plan: str = "", **extra) -> dict:
    block = BlockConfig(
        hidden_size=width,
        mixer=AttentionConfig(num_heads=2),
        mlp=MLPConfig(intermediate_size=2 * width, activation="gelu", gated=False, bias=True),
    )
    values = {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "blocks": [block.to_dict()],
        "plan": plan or f"0-{layers - 1}",
        "norm": {},
        "initializer_range": 0.125,
    }
    return values | extra


def made(kind: Parametrisation, decoder: dict) -> tuple[LoopwiseForCausalLM, dict[str, Multipliers]]:
    """A model under a parametrisation, as a run makes it, and the multipliers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LoopwiseForCausalLM(LoopwiseDecoderConfig(**kind.decoder_fields(decoder)))
    rules = kind.multipliers(trainable(model), decoder)
    scale_initial_values(trainable(model), rules)
    return model, rules


def tokens(seed: int, length: int = 9) -> torch.Tensor:
    return torch.randint(VOCAB, (4, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_block_scales_written_out(placement: str) -> None:
    before, _ = PLACEMENTS[placement]
    config = BlockConfig(
        hidden_size=12,
        mixer=AttentionConfig(num_heads=2),
        mlp=MLPConfig(intermediate_size=7),
        placement=placement,
        norm_scale=0.5 if before else 1.0,
        branch_scale=0.25,
    )
    block, start = build(config), noise(2, 5, 12)

    def residual(x, function, norm_in, norm_out):
        branch = function(x if norm_in is None else config.norm_scale * norm_in(x))
        if placement in ("branch", "branch_out"):
            return x + 0.25 * norm_out(branch)
        return x + 0.25 * branch if norm_out is None else norm_out(x + 0.25 * branch)

    middle = residual(start, lambda x: block.mixer(x)[0], block.mixer_norm_in, block.mixer_norm_out)
    wanted = residual(middle, block.mlp, block.mlp_norm_in, block.mlp_norm_out)
    torch.testing.assert_close(block(start, **tables(config)), wanted)


def test_a_norm_scale_without_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BlockConfig.norm_scale is 0.5: placement 'post' has no norm before"):
        BlockConfig(
            hidden_size=12,
            mixer=AttentionConfig(num_heads=2),
            mlp=MLPConfig(intermediate_size=7),
            placement="post",
            norm_scale=0.5,
        )


def test_configs_written_before_the_scales_are_read() -> None:
    block = fields(1, 8)["blocks"][0]
    old = {key: value for key, value in block.items() if key not in ("norm_scale", "branch_scale")}
    assert BlockConfig.from_dict(old) == BlockConfig.from_dict(block)


@pytest.mark.parametrize(
    ("plan", "depths"),
    [("0-3", [1, 2, 3, 4]), ("0 core:(1-2)x3 3", [1, 2, 3, 8]), ("2 0 (1)x2 0", [2, 3, 1, 5]), ("", [1, 2, 3, 4])],
)
def test_the_depth_of_a_layer_is_its_first_slot(plan: str, depths: list[int]) -> None:
    assert layer_depths({"plan": plan, "num_hidden_layers": 4}) == depths


def test_layer_norm_scaling_sets_every_block() -> None:
    scaled = LayerNormScaling().decoder_fields(fields(3, 8, "0 core:(1)x4 2"))
    assert [block["norm_scale"] for block in scaled["blocks"]] == [1, 2**-0.5, 6**-0.5]
    assert all(block["branch_scale"] == 1 for block in scaled["blocks"])
    post = fields(2, 8)
    post["blocks"] = [post["blocks"][0] | {"placement": "branch"}]
    with pytest.raises(ValueError, match=r"layer_norm_scaling: placement='branch'.*use placement 'pre'"):
        LayerNormScaling().decoder_fields(post)


def stream_variances(kind: Parametrisation, layers: int) -> list[float]:
    """Mean square of the stream after every layer at the start."""
    decoder = fields(layers, 32, initializer_range=32**-0.5)
    model, _ = made(kind, decoder)
    with torch.no_grad():
        states = model(input_ids=tokens(0), output_hidden_states=True).hidden_states
    return [float(state.square().mean()) for state in states[1:-1]]


def test_layer_norm_scaling_keeps_the_variance_of_deep_streams_down() -> None:
    plain, scaled = (stream_variances(kind, 32) for kind in (StandardParametrisation(), LayerNormScaling()))
    # One branch adds a variance c: plain sums to c l, scaled to about c times the harmonic number of l
    late = [value[-1] - value[15] for value in (plain, scaled)]
    assert late[0] > 5 * late[1]
    assert plain[-1] / plain[7] > 3
    assert scaled[-1] / scaled[7] < 2


@pytest.mark.parametrize("tied", [False, True])
def test_complete_p_at_the_base_size_is_the_standard_one(tied: bool) -> None:
    decoder = fields(4, 16, tie_word_embeddings=tied)
    kind = CompletePParametrisation(base_width=16, base_depth=4, base_std=0.125, scale_attention=False)
    (ours, rules), (plain, _) = made(kind, decoder), made(StandardParametrisation(), decoder)
    assert torch.equal(ours(input_ids=tokens(0)).logits, plain(input_ids=tokens(0)).logits)
    assert set(rules.values()) == {Multipliers()}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_table_of_complete_p(alpha: float) -> None:
    decoder = fields(3, 32, "0 core:(1)x6 2")  # 8 slots
    kind = CompletePParametrisation(base_width=8, base_depth=2, alpha=alpha, base_std=0.1)
    scaled = kind.decoder_fields(decoder)
    n, m = 4.0, 4.0
    assert [block["branch_scale"] for block in scaled["blocks"]] == [m**-alpha] * 3
    assert [block["mixer"]["scale"] for block in scaled["blocks"]] == [1 / 16] * 3
    assert scaled["initializer_range"] == 0.1
    model, rules = made(kind, decoder)
    eps, slow = m**-alpha / n, m ** (alpha - 1)
    vector, table = Multipliers(lr=slow, eps=eps), Multipliers(eps=eps)
    assert rules["model.layers.1.mlp.up_proj.weight"] == Multipliers(
        lr=slow / n, weight_decay=n, init_std=n**-0.5, eps=eps
    )
    assert rules["model.layers.1.mlp.up_proj.bias"] == rules["model.layers.2.mixer_norm_in.weight"] == vector
    assert rules["model.embed_tokens.weight"] == rules["model.norm.weight"] == table
    assert rules["lm_head.weight"] == Multipliers(lr=1 / n, weight_decay=n, init_std=1 / n, eps=eps * n)
    assert rules.keys() == trainable(model).keys()
    stds = {name: float(value.detach().std()) for name, value in model.named_parameters()}
    assert stds["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.05, rel=0.1)
    assert stds["model.embed_tokens.weight"] == pytest.approx(0.1, rel=0.1)
    assert stds["lm_head.weight"] == pytest.approx(0.025, rel=0.1)


class Divided(nn.Module):
    """A decoder whose logits are divided by a number: the form in which the authors write the head."""

    def __init__(self, model: LoopwiseForCausalLM, by: float):
        super().__init__()
        self.model, self.by = model, by

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits / self.by


@pytest.mark.parametrize("tied", [False, True])
def test_a_smaller_head_is_the_head_with_divided_logits(tied: bool) -> None:
    """Training steps included: with the multipliers the two stay the same function."""
    kind, width = CompletePParametrisation(base_width=4, base_depth=2, base_std=0.5), 4.0
    decoder = fields(2, 16, tie_word_embeddings=tied)
    ours, rules = made(kind, decoder)
    ours = ours.double()
    plain = LoopwiseForCausalLM(LoopwiseDecoderConfig(**(kind.decoder_fields(decoder) | {"embedding_scale": 1.0})))
    values = {name: value.clone() for name, value in ours.state_dict().items()}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    values |= {name: value * width for name, value in values.items() if name in (head, "lm_head.weight")}
    plain.double().load_state_dict(values)
    theirs = Divided(plain, width)
    as_published = {name: rule for name, rule in rules.items() if name != head} | {head: Multipliers(eps=0.25)}
    # an epsilon that matters and a decay that reaches the head
    config = AdamWConfig(lr=0.01, eps=1e-2, weight_decay=0.5, decay="all")
    pairs = [
        (lambda ids: ours(input_ids=ids).logits, config.build(trainable(ours), rules)),
        (theirs, config.build(trainable(plain), as_published)),
    ]
    for step in range(4):
        ids = tokens(step)
        first, second = (forward(ids) for forward, _ in pairs)
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)
        for logits, (_, optimizer) in zip((first, second), pairs, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            optimizer.step()


def changes(kind: Parametrisation, decoder: dict, factors_of: dict | None = None) -> tuple[float, float]:
    """How far four steps of AdamW move the last state and the logits, as root mean squares over coordinates.

    `factors_of` is the decoder whose size the parametrisation sees, where it is another.
    """
    seen = factors_of or decoder
    model, rules = made(kind, seen)
    model.model.loopwise.plan = Plan.parse(decoder["plan"])
    optimizer = AdamWConfig(lr=2e-3, weight_decay=0.0, eps=1e-12).build(trainable(model), rules)
    ids = tokens(0)

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        return output.hidden_states[-2], output.logits

    before = look()
    for _ in range(4):
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    state, logits = (float((new - old).square().mean().sqrt()) for new, old in zip(look(), before, strict=True))
    return state, logits


@pytest.mark.parametrize(
    ("sizes", "state_grows", "logits_grow"), [(((2, 16), (32, 16)), 10, 2), (((2, 16), (2, 256)), 4, 3)]
)
def test_complete_p_moves_activations_alike_at_every_size(
    sizes: tuple[tuple[int, int], ...], state_grows: float, logits_grow: float
) -> None:
    """The coordinate check of 2505.01618 over depths, then widths: without the parametrisation changes grow."""
    ratios = {}
    for kind in (CompletePParametrisation(base_width=16, base_depth=2), StandardParametrisation()):
        small, large = (changes(kind, fields(*size, initializer_range=size[1] ** -0.5)) for size in sizes)
        ratios[kind.kind] = large[0] / small[0], large[1] / small[1]
    state, logits = ratios["parametrisation.complete_p"]
    assert 0.5 < state < 2 and 0.3 < logits < 2, ratios
    state, logits = ratios["parametrisation.standard"]
    assert state > state_grows and logits > logits_grow, ratios


def test_the_depth_of_a_looped_model_counts_slots() -> None:
    """One layer visited 64 times moves the state about as far as one visited 8 times; by its layers, far more."""
    kind = CompletePParametrisation(base_width=16, base_depth=2)
    few, many = (fields(1, 16, f"(0)x{loops}") for loops in (8, 64))
    (by_slots, _), (short, _), (by_layers, _) = (
        changes(kind, many),
        changes(kind, few),
        changes(kind, many, fields(1, 16, "(0)x2")),
    )
    assert 0.5 < by_slots / short < 2
    assert by_layers / short > 10


@pytest.mark.parametrize(
    "kind", [StandardParametrisation(), LayerNormScaling(), CompletePParametrisation(base_width=8, alpha=0.5)]
)
def test_models_under_a_parametrisation_are_saved_whole(kind: Parametrisation, tmp_path) -> None:
    assert from_dict(to_dict(kind)) == kind
    model, _ = made(kind, fields(2, 16, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    loaded = LoopwiseForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=tokens(0)).logits, model(input_ids=tokens(0)).logits)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CompletePParametrisation(alpha=0.4), "alpha=0.4 must be between 0.5 and 1"),
        (lambda: CompletePParametrisation(base_width=0), "base_width=0 must be at least 1"),
        (lambda: CompletePParametrisation(base_std=0.0), "base_std=0.0 must be above 0"),
        (lambda: LayerNormScaling().decoder_fields(fields(3, 8) | {"blocks": [{}, {}]}), "blocks has 2 entries"),
    ],
)
def test_refusals(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
