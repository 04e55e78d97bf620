"""Mixture-of-Recursions: parity with the reference, routing, the selected cache, causality, round trips, refusals.

The expert-choice golden is the shared one. That of token choice was written by the same public code (a fork at 0c98df3,
transformers 4.53.3, torch 2.13, eager attention, float32, one row at a time because batches fail there): `logits`, and
`depth`, the recursion after which each token leaves.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import loopwise
from loopwise.checkpoints.loading import export_checkpoint, import_checkpoint
from loopwise.checkpoints.mor import MOR
from loopwise.models.attach import set_cache
from loopwise.models.rotary import rotary_tables
from tests.checkpoints.foreign import (
    GOLDENS,
    REMOVED,
    assert_round_trip,
    assert_same_tensors,
    config_of,
    random_checkpoint,
    spoiled,
    tensors_of,
    write,
)

ATOL = 2e-5
EXPERT, TOKEN = GOLDENS / "mor_expert", GOLDENS / "mor_token"
EXPECTED = tensors_of(EXPERT, "expected")
IDS_BT = tensors_of(EXPERT, "inputs")["input_ids"]
CONFIG = config_of(EXPERT)
GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
MIDDLE = [name for name in tensors_of(EXPERT) if ".block." in name]


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with fields replaced, given by dotted path."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, field = path.split(".")
        part = config
        for parent in parents:
            part = part[parent]
        if value is REMOVED:
            del part[field]
        else:
            part[field] = value
    return config


OTHERS = {
    "three layers": {"llama_config.num_hidden_layers": 11},
    "four recursions": {
        "llama_config.num_hidden_layers": 7,
        "cfg.recursive.num_recursion": 4,
        "cfg.mor.capacity": "0.9,0.9,0.5,0.2",
    },
    "cycle": {"cfg.recursive.sharing": "cycle", "llama_config.num_hidden_layers": 6},
    "default capacities, other sizes": {
        "cfg.mor.capacity": None,
        "llama_config.hidden_size": 24,
        "llama_config.num_attention_heads": 3,
        "llama_config.num_key_value_heads": 1,
        "llama_config.head_dim": 10,
        "llama_config.intermediate_size": 20,
        "llama_config.tie_word_embeddings": False,
    },
    "tanh": {"cfg.mor.expert.router_func": "tanh", "cfg.mor.expert.alpha": 0.3, "cfg.mor.temp": 2.0},
    "no function, a wide router": {"cfg.mor.expert.router_func": None, "cfg.mor.router_type": "wide_mlp"},
    "additive": {"cfg.mor.expert.gating": "additive", "llama_config.hidden_act": "gelu"},
    "token choice": {
        "cfg.mor.type": "token",
        "cfg.mor.token": {"router_func": "softmax", "alpha": 1.0, "balancing": "loss_free", "u": 0.01},
    },
    "token choice, sigmoid": {
        "cfg.mor.type": "token",
        "cfg.mor.router_type": "mlp",
        "cfg.mor.token": {"router_func": "sigmoid", "alpha": 0.4, "balancing": "loss", "gating": "additive"},
        "llama_config.num_hidden_layers": 8,
    },
}


@pytest.fixture(scope="module")
def model():
    return import_checkpoint(EXPERT)


@pytest.fixture(scope="module")
def chooser():
    return import_checkpoint(TOKEN)


@pytest.fixture(scope="module", params=OTHERS)
def other(request, tmp_path_factory):
    """A random checkpoint of another shape: folder and model, whose router is made decided enough to matter."""
    folder = tmp_path_factory.mktemp("other") / "model"
    config = merged(CONFIG, OTHERS[request.param])
    model = import_checkpoint(random_checkpoint(MOR, config, folder))
    return folder, model


def close(got, want):
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


def causal(model):
    return model.causal_options


def with_capacities(tmp_path, which):
    return import_checkpoint(
        write(tmp_path / which, merged(CONFIG, {"cfg.mor.capacity": CONFIG[f"capacity_{which}"]}), tensors_of(EXPERT))
    )


class Tokens:
    """How many tokens pass through every layer, counted at the layers."""

    def __init__(self, model):
        self.counts = [0] * len(model.model.layers)
        self.handles = [layer.register_forward_pre_hook(self.counter(i)) for i, layer in enumerate(model.model.layers)]

    def counter(self, index):
        def count(_, args):
            self.counts[index] += args[0].shape[:2].numel()

        return count


def naive(model, ids_BT, *, select="threshold", lengths=None):
    """The rule written out: one row at a time, chosen tokens gathered, layers called one by one."""
    decoder, plan = model.model, loopwise.plan_of(model)
    loops = [loop for name, loop in plan.loops.items() if name in decoder.loops]
    first, last = min(loops[0].body[0].first, 1), loops[-1].body[0].last
    router = next(m.route for m in decoder.loops.values() if m.route is not None)
    steps = [loop.body[0] for loop in loops for _ in range(loop.count)]

    def run(layer, x_tD, positions):
        rope = decoder.layers[layer].block_config.mixer.rope
        tables = rotary_tables(positions[None], rope)
        return decoder.layers[layer](x_tD[None], position_embeddings=tables)[0]

    def expert(x_TD, alive):
        for i, span in enumerate(steps):
            score = router.routers[i](x_TD / router.config.temperature)[:, 0]
            if select == "top":
                count = max(1, int(router.capacities[i] * len(x_TD)))
                ranked = sorted(alive, key=lambda t, s=score: (-s[t].item(), t))
                alive = sorted(ranked[:count])
            else:
                alive = [t for t in alive if torch.sigmoid(score[t]) > 0.5]
            weight = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}.get(router.config.function)
            g = score if weight is None else router.config.alpha * weight(score)
            g = torch.ones_like(g) if router.config.gating == "additive" else g
            if not alive:
                continue
            chosen = torch.tensor(alive)
            part = x_TD[chosen]
            for layer in range(span.first, span.last + 1):
                part = run(layer, part, chosen)
            x_TD = x_TD.index_add(0, chosen, g[chosen, None] * part)
        return x_TD

    def token(x_TD, alive):
        config = router.config
        logits = router.router(x_TD / config.temperature)
        chances = config.alpha * (logits.sigmoid() if config.function == "sigmoid" else logits.softmax(-1))
        depth = (chances + router.router_bias if config.balancing == "loss_free" else chances).argmax(-1)
        g = torch.ones(len(x_TD)) if config.gating == "additive" else chances.gather(1, depth[:, None])[:, 0]
        inner = x_TD.clone()
        for i, span in enumerate(steps):
            chosen = (depth >= i).nonzero()[:, 0]
            if not len(chosen):
                continue
            part = inner[chosen]
            for layer in range(span.first, span.last + 1):
                part = run(layer, part, chosen)
            inner = inner.index_copy(0, chosen, part)
        return x_TD + g[:, None] * inner

    rows = []
    for ids_T in ids_BT:
        x_TD, everything = decoder.embed_tokens(ids_T), torch.arange(len(ids_T))
        for layer in range(first):
            x_TD = run(layer, x_TD, everything)
        x_TD = (expert if hasattr(router, "routers") else token)(x_TD, everything.tolist())
        for layer in range(last + 1, len(decoder.layers)):
            x_TD = run(layer, x_TD, everything)
        rows.append(model.lm_head(decoder.norm(x_TD)))
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("which", ["full", "hier"])
def test_expert_choice_is_that_of_the_reference(tmp_path, which, use_cache):
    output = with_capacities(tmp_path, which)(IDS_BT, output_loops=True, use_cache=use_cache)
    close(output.logits, EXPECTED[f"logits_cap_{which}"])
    for i, (state_BTD, route) in enumerate(zip(output.loop_states, output.routes, strict=True)):
        close(state_BTD, EXPECTED[f"hidden_after_depth{i}_cap_{which}"])
        assert torch.equal(route.positions, EXPECTED[f"selected_tokens_depth{i}_cap_{which}"])
        scores = route.scores_BT[route.candidates_BT].view(2, -1)
        close(scores, EXPECTED[f"router_logits_depth{i}_cap_{which}"])


@torch.no_grad()
def test_token_choice_is_that_of_the_reference(chooser):
    expected, ids_BT = tensors_of(TOKEN, "expected"), tensors_of(TOKEN, "inputs")["input_ids"]
    output = chooser(ids_BT, output_loops=True)
    close(output.logits, expected["logits"])
    assert torch.equal(output.routes[0].depth_BT, expected["depth"])
    assert len(expected["depth"].unique()) == 3


@torch.no_grad()
@pytest.mark.parametrize("select", ["top", "threshold"])
def test_other_shapes_do_what_the_rule_says(other, select):
    folder, model = other
    ids_BT = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(1))
    for use_cache in (False, True):
        got = model(ids_BT, select=select, use_cache=use_cache).logits
        close(got, naive(model, ids_BT, select=select))


def test_other_shapes_go_round(other, tmp_path):
    folder, model = other
    _, again = assert_round_trip(folder, tmp_path)
    ids_BT = IDS_BT % 60
    with torch.no_grad():
        assert torch.equal(again.eval()(ids_BT).logits, model(ids_BT).logits)


@pytest.mark.parametrize("golden", [EXPERT, TOKEN], ids=["expert", "token"])
def test_round_trip(golden, tmp_path):
    model, again = assert_round_trip(golden, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS_BT % 60).logits, model(IDS_BT % 60).logits)


def test_tied_copies_are_stored_once_and_written_again(tmp_path):
    tensors = tensors_of(EXPERT)
    for i in (2, 3):
        tensors |= {name.replace("layers.1.", f"layers.{i}."): tensors[name] for name in MIDDLE}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder = write(tmp_path / "full", CONFIG, {name: tensor.clone() for name, tensor in tensors.items()})
    model, _ = assert_round_trip(folder, tmp_path)
    assert len(model.model.layers) == 3
    close(model(IDS_BT).logits, EXPECTED["logits_cap_hier"])


def test_a_file_may_keep_another_of_the_tied_copies(tmp_path):
    tensors = {name.replace("layers.1.block", "layers.3.block"): t for name, t in tensors_of(EXPERT).items()}
    model, _ = assert_round_trip(write(tmp_path / "last", CONFIG, tensors), tmp_path)
    close(model(IDS_BT).logits, EXPECTED["logits_cap_hier"])


def test_plan_and_description(model, chooser):
    assert str(loopwise.plan_of(model)) == "0 core:(1)x3 2" == str(loopwise.plan_of(chooser))
    assert model.config.cache == "selected"


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "chooser"])
def test_generation_with_a_cache_is_generation_without(name, request):
    model = request.getfixturevalue(name)
    ids_BT = IDS_BT[:, :6] % 60
    got = [
        model.generate(ids_BT, use_cache=use_cache, output_logits=True, return_dict_in_generate=True, **GREEDY)
        for use_cache in (True, False)
    ]
    assert torch.equal(got[0].sequences, got[1].sequences)
    for cached, plain in zip(got[0].logits, got[1].logits, strict=True):
        close(cached, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "chooser"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_beams_and_lookup_with_a_cache(name, options, request):
    model = request.getfixturevalue(name)
    ids_BT = (IDS_BT[:1, :5] % 60).repeat(1, 3)
    want = {"num_beams": 3} if "num_beams" in options else {}
    cached = model.generate(ids_BT, use_cache=True, **options, **GREEDY)
    assert torch.equal(cached, model.generate(ids_BT, use_cache=False, **want, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "chooser"])
def test_left_padding_does_not_matter(name, request):
    model = request.getfixturevalue(name)
    ids_BT, mask_BT = IDS_BT % 60, torch.ones_like(IDS_BT)
    mask_BT[0, :4] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for select in ("threshold", "top"):
        batch = model(ids_BT, attention_mask=mask_BT, position_ids=positions_BT, select=select).logits
        close(batch[0, 4:], model(ids_BT[:1, 4:], select=select).logits[0])
        close(batch[1], model(ids_BT[1:], select=select).logits[0])
    cached = model.generate(ids_BT, attention_mask=mask_BT, use_cache=True, **GREEDY)
    assert torch.equal(cached, model.generate(ids_BT, attention_mask=mask_BT, use_cache=False, **GREEDY))
    alone = model.generate(ids_BT[:1, 4:], use_cache=True, **GREEDY)
    assert torch.equal(cached[:1, 4:], alone)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["model", "chooser"])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 3, 2], [1, 4, 7]])
def test_a_prompt_in_pieces(name, pieces, implementation, request):
    model = copy.deepcopy(request.getfixturevalue(name))
    model.set_attn_implementation(implementation)
    ids_BT, cache, logits = IDS_BT % 60, None, []
    for part in ids_BT.split(pieces, dim=1):
        output = model(part, past_key_values=cache, use_cache=True, **causal(model))
        cache = output.past_key_values
        logits.append(output.logits)
    close(torch.cat(logits, 1), naive(model, ids_BT))


@torch.no_grad()
def test_the_selected_cache_holds_what_was_selected(model):
    output = model(IDS_BT, select="threshold", use_cache=True, output_loops=True)
    cache = output.past_key_values
    for slot, route in zip(loopwise.plan_of(model).slots[1:4], output.routes, strict=True):
        entry = cache.layers[cache.slots[slot.key]]
        counts = route.active_BT.sum(1)
        assert entry.get_seq_length() == IDS_BT.shape[1]
        assert counts.max() < IDS_BT.shape[1] and len(counts.unique()) == 2
        assert (entry.keys is None) == (not counts.any())
        assert entry.keys is None or entry.keys.shape[2] == counts.max()
    assert cache.get_seq_length() == IDS_BT.shape[1]


@torch.no_grad()
def test_a_cropped_cache_goes_on(model):
    flipped_BT = IDS_BT.clone()
    flipped_BT[:, 7:] = IDS_BT.flip(0)[:, 7:]
    cache = model(IDS_BT, select="threshold", use_cache=True).past_key_values
    cache.crop(-5)
    output = model(flipped_BT[:, 7:], select="threshold", past_key_values=cache)
    close(output.logits, naive(model, flipped_BT)[:, 7:])


@torch.no_grad()
def test_only_selected_tokens_are_computed(model, chooser):
    for looped, options in ((model, {"select": "threshold"}), (model, {"select": "top"}), (chooser, {})):
        counter = Tokens(looped)
        routes = looped(IDS_BT % 60, output_loops=True, **options).routes
        [handle.remove() for handle in counter.handles]
        if looped is model:
            want = sum(int(route.active_BT.sum()) for route in routes)
        else:
            want = int((routes[0].depth_BT + 1).sum())
        assert counter.counts == [24, want, 24] and want < 72


@torch.no_grad()
def test_thresholds_and_token_choice_are_causal_and_the_best_tokens_are_not(model, chooser):
    leaks = dict.fromkeys(("top", "threshold", "token"), 0)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        ids_BT = torch.randint(60, (1, 12), generator=generator)
        t = int(torch.randint(6, 12, (1,), generator=generator))
        changed_BT = ids_BT.clone()
        changed_BT[:, t:] = torch.randint(60, (1, 12 - t), generator=generator)
        for name in leaks:
            looped, options = (chooser, {}) if name == "token" else (model, {"select": name})
            before, after = (looped(x, **options).logits[:, :t] for x in (ids_BT, changed_BT))
            leaks[name] += bool((before - after).abs().max() > 1e-4)
    assert leaks["threshold"] == leaks["token"] == 0
    assert leaks["top"] > 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["model", "chooser"])
def test_loops_up_and_down(name, request):
    model = copy.deepcopy(request.getfixturevalue(name))
    ids_BT = IDS_BT % 60
    full = model(ids_BT, **causal(model)).logits
    shallow = model(ids_BT, loops=1, **causal(model)).logits
    assert not torch.equal(full, shallow)
    loopwise.set_loops(model, core=1)
    assert torch.equal(model(ids_BT, **causal(model)).logits, shallow)
    assert torch.equal(model(ids_BT, loops=3, **causal(model)).logits, full)
    got = model.generate(ids_BT[:, :4], use_cache=True, loops=2, **GREEDY)
    assert torch.equal(got, model.generate(ids_BT[:, :4], use_cache=False, loops=2, **GREEDY))
    with pytest.raises(ValueError, match="loop 'core' has routers for 3 iterations and is to run 4"):
        loopwise.set_loops(model, core=4)(ids_BT)


@pytest.mark.parametrize("golden", [EXPERT, TOKEN], ids=["expert", "token"])
def test_training_reaches_routers_and_balances_them(golden):
    model = import_checkpoint(golden)
    ids_BT = IDS_BT % 60
    plain = model(ids_BT, labels=ids_BT).loss
    output = model.train()(ids_BT, labels=ids_BT)
    routes = model.eval()(ids_BT, output_loops=True).routes
    if golden == EXPERT:
        terms = [
            torch.nn.functional.binary_cross_entropy_with_logits(
                r.scores_BT[r.candidates_BT], r.active_BT[r.candidates_BT].float()
            )
            for r in routes
        ]
        torch.testing.assert_close(output.loss, plain + 0.001 * sum(terms))
    else:
        assert torch.equal(output.loss, plain)  # balanced by a bias, without a loss
    output.loss.backward()
    routers = {n: p.grad for n, p in model.named_parameters() if ".route." in n}
    assert routers and all(grad is not None and grad.abs().max() > 0 for grad in routers.values())


@torch.no_grad()
def test_a_cache_does_not_go_on_with_the_best_tokens(model):
    cache = model(IDS_BT[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="select='threshold' from the first call on"):
        model(IDS_BT[:, 5:6], past_key_values=cache)


@torch.no_grad()
def test_other_cache_policies_are_refused(model):
    with pytest.raises(ValueError, match="cache policy selected"):
        set_cache(copy.deepcopy(model), "own")(IDS_BT, use_cache=True)
    with pytest.raises(ValueError, match="catch_up"):
        set_cache(copy.deepcopy(model), "selected", on_deeper="catch_up")
    with pytest.raises(ValueError, match="no part of a pair"):
        set_cache(copy.deepcopy(model), "own/selected")


def test_an_unknown_select_is_refused(model):
    with pytest.raises(ValueError, match="select='best'"):
        model(IDS_BT, select="best")


def untied(folder, names, seed=0):
    """The golden with tensors of the second and third recursion of their own."""
    tensors, generator = tensors_of(EXPERT), torch.Generator().manual_seed(seed)
    for i in (2, 3):
        for name in names:
            noise = 0.1 * torch.randn(tensors[name].shape, generator=generator)
            tensors[name.replace("layers.1.", f"layers.{i}.")] = tensors[name] + noise
    return write(folder, CONFIG, tensors)


ATTENTION = [name for name in MIDDLE if "self_attn" in name]


@pytest.mark.parametrize("names", [MIDDLE, ATTENTION, ATTENTION[:1]], ids=["all", "attention", "one tensor"])
def test_untied_recursions_are_refused_or_layers_of_their_own(tmp_path, names):
    folder = untied(tmp_path / "untied", names)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.block.* must be tied to model\.layers\.1.*allow_untied"):
        loopwise.load(folder)
    with pytest.warns(UserWarning, match=r"untied.*separate layers, plan 0 r0:\(1\) r1:\(2\) r2:\(3\) 4"):
        model = loopwise.load(folder, allow_untied=True)
    assert len(model.model.layers) == 5
    with torch.no_grad():
        close(model(IDS_BT).logits, naive(model, IDS_BT, select="top"))
        got = [model.generate(IDS_BT[:, :5], use_cache=flag, **GREEDY) for flag in (True, False)]
    assert torch.equal(*got)
    export_checkpoint(model, tmp_path / "again")
    assert_same_tensors(tensors_of(tmp_path / "again"), tensors_of(folder))
    model.save_pretrained(tmp_path / "own")
    export_checkpoint(loopwise.load(tmp_path / "own"), tmp_path / "third")
    assert_same_tensors(tensors_of(tmp_path / "third"), tensors_of(folder))


def test_untied_tensors_of_equal_values_are_the_tied_model(tmp_path):
    folder = untied(tmp_path / "untied", MIDDLE)
    tensors = tensors_of(folder)
    tensors |= {name: tensors[name.replace("layers.2.", "layers.1.")] for name in tensors if "layers.2.block" in name}
    tensors |= {name: tensors[name.replace("layers.3.", "layers.1.")] for name in tensors if "layers.3.block" in name}
    model = loopwise.load(write(tmp_path / "equal", CONFIG, {n: t.clone() for n, t in tensors.items()}))
    assert len(model.model.layers) == 3
    norms = merged(CONFIG, {"cfg.recursive.ln_share": False})
    folder = write(tmp_path / "norms", norms, {n: t.clone() for n, t in tensors.items()})
    with pytest.raises(ValueError, match="ln_share"):
        loopwise.load(folder)
    with pytest.warns(UserWarning, match="separate layers"):
        apart = loopwise.load(folder, allow_untied=True)
    with torch.no_grad():
        assert torch.equal(apart(IDS_BT).logits, model(IDS_BT).logits)


def test_what_became_different_is_not_written_as_one(tmp_path):
    with pytest.warns(UserWarning, match="separate layers"):
        model = loopwise.load(untied(tmp_path / "untied", ATTENTION), allow_untied=True)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has become other"):
        export_checkpoint(model, tmp_path / "again")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.2.mor_router.router.weight": REMOVED}, r"lacks tensor model\.layers\.2\.mor_router"),
        ({MIDDLE[0]: REMOVED}, rf"lacks tensor {MIDDLE[0]}"),
        ({"model.layers.9.extra": torch.zeros(2)}, r"model\.layers\.9\.extra"),
        (
            {"model.layers.4.mlp.down_proj.weight": torch.zeros(32, 75)},
            r"layers\.4\.mlp\.down_proj.*\[32, 75\].*\[32, 76\]",
        ),
        ({"lm_head.weight": torch.zeros(63, 32)}, r"lm_head\.weight must be tied to model\.embed_tokens"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, tensors, message):
    folder = spoiled("mor_expert", tmp_path / "spoiled", tensors=tensors)
    with pytest.raises(ValueError, match=message):
        loopwise.load(folder)


def test_an_untied_head_is_refused_whatever_is_allowed(tmp_path):
    folder = spoiled("mor_expert", tmp_path / "spoiled", tensors={"lm_head.weight": torch.zeros(63, 32)})
    with pytest.raises(ValueError, match="lm_head"):
        loopwise.load(folder, allow_untied=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cfg.mor.type", "prototype"),
        ("cfg.mor.router_type", "attention"),
        ("cfg.mor.rand_router", True),
        ("cfg.mor.capacity", "1.0,0.5"),
        ("cfg.mor.capacity", "0.5,0.7,0.2"),
        ("cfg.mor.capacity", "1.0,a,0.1"),
        ("cfg.mor.expert.router_func", "relu"),
        ("cfg.mor.expert.sampling", "aux_router"),
        ("cfg.mor.expert.gating", "mean"),
        ("cfg.recursive.sharing", "sequence"),
        ("cfg.recursive.num_recursion", 1),
        ("cfg.recursive", REMOVED),
        ("cfg.kv_sharing.enable", True),
        ("llama_config.hidden_act", "tanh"),
        ("llama_config.num_hidden_layers", 4),
        ("llama_config", REMOVED),
    ],
)
def test_unsupported_values_are_named(tmp_path, field, value):
    folder = write(tmp_path / "spoiled", merged(CONFIG, {field: value}), tensors_of(EXPERT))
    with pytest.raises(ValueError, match=field.removeprefix("llama_config.")) as caught:
        loopwise.load(folder)
    assert "\n" not in str(caught.value)


def test_token_choice_without_a_first_layer_is_refused(tmp_path):
    config = merged(config_of(TOKEN), {"cfg.recursive.sharing": "cycle"})
    with pytest.raises(ValueError, match=r"cfg\.recursive\.sharing"):
        loopwise.load(write(tmp_path / "cycle", config, tensors_of(TOKEN)))


def test_routers_go_with_no_other_component():
    config = copy.deepcopy(import_checkpoint(EXPERT).config)
    kind = type(import_checkpoint(EXPERT))
    config.loops = {"core": config.loops["core"] | {"gate": True}}
    with pytest.raises(ValueError, match="loop 'core' has routers.*leave 'gate' out"):
        kind(config)
    config.loops = {"core": {"follows": "nothing"}}
    with pytest.raises(ValueError, match="follows 'nothing'"):
        kind(config)
