"""One law per pair of capabilities that the matrix says runs; the matrix and this table must agree."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.cli.decoding import Decoding
from loopwise.edit.operators import LlamaPro, Midas
from loopwise.edit.surgery import Recursive, Tie, Untie
from loopwise.loop.compose import CAPABILITIES, matrix
from loopwise.loop.halting import HazardHalting
from loopwise.models.relaxation import add_relaxation, relaxation_of
from loopwise.train.growth import edit
from loopwise.train.parallel import count_collectives, finish_backward, shard
from tests.loop import decoding_laws as decoding
from tests.train.ranks import on_ranks

PLAN = "0 core:(1-4)x2 5"
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = GREEDY | {"do_sample": True, "temperature": 0.8, "top_k": 20}
LOOKUP = GREEDY | {"prompt_lookup_num_tokens": 3}


def looped():
    return loopwise.attach(tiny_model("llama"), PLAN)


def prompt(batch=1):
    ids_BT = tiny_inputs(looped(), batch=batch, length=6)
    return torch.cat([ids_BT, ids_BT], dim=1)  # repeats itself, so that lookups hit


def generate(model, ids_BT, seed=0, **options):
    torch.manual_seed(seed)
    return model.generate(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **options)


def with_adapters(model):
    config = LoraConfig(
        r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


def loop_and_sampler():
    model, ids_BT = looped(), prompt(2)
    plain = loopwise.materialize(model)
    for options in (SAMPLED, GREEDY | {"num_beams": 3}):
        assert torch.equal(generate(model, ids_BT, **options), generate(plain, ids_BT, **options))


def loop_and_speculation():
    model, ids_BT = looped(), prompt()
    want = generate(model, ids_BT, **GREEDY)
    assert torch.equal(generate(model, ids_BT, **LOOKUP), want)
    assistant = loopwise.attach(tiny_model("llama"), "0 core:(1-4)x1 5")
    assert torch.equal(generate(model, ids_BT, assistant_model=assistant, **GREEDY), want)


def loop_and_adapters():
    model, ids_BT = looped(), prompt(2)
    before = model(ids_BT).logits
    after_attach = with_adapters(model)
    assert not torch.allclose(after_attach(ids_BT).logits, before, atol=1e-3)
    before_attach = loopwise.attach(with_adapters(tiny_model("llama")), PLAN)
    assert torch.equal(after_attach(ids_BT).logits, before_attach(ids_BT).logits)
    merged = after_attach.merge_and_unload()
    plain = loopwise.materialize(merged)
    torch.testing.assert_close(merged(ids_BT).logits, plain(ids_BT).logits, atol=1e-5, rtol=1e-5)


def sampler_and_adapters():
    model, ids_BT = with_adapters(looped()), prompt(2)
    sampled = generate(model, ids_BT, **SAMPLED)
    merged = model.merge_and_unload()
    assert torch.equal(sampled, generate(merged, ids_BT, **SAMPLED))


def sampler_and_speculation():
    model, ids_BT = looped(), prompt()
    certain = LOOKUP | {"do_sample": True, "top_k": 1}
    assert torch.equal(generate(model, ids_BT, **certain), generate(model, ids_BT, **GREEDY))


def speculation_and_adapters():
    model, ids_BT = with_adapters(looped()), prompt()
    assert torch.equal(generate(model, ids_BT, **LOOKUP), generate(model, ids_BT, **GREEDY))


def routed():
    return loopwise.load(Path(__file__).parents[1] / "goldens" / "mor_expert")


def routed_prompt(batch=1):
    ids_BT = torch.randint(63, (batch, 5), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids_BT, ids_BT], dim=1)


def unrolled_routed(model):
    """Layers of their own, copied, that go through the same routers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.plan, config.relaxation = 5, "0 r0:(1)x1 r1:(2)x1 r2:(3)x1 4", None
    config.loops = {"r0": config.loops["core"], "r1": {"follows": "r0"}, "r2": {"follows": "r0"}}
    plain = type(model)(config).eval()
    theirs = model.state_dict()
    sources = {"0": "0", "1": "1", "2": "1", "3": "1", "4": "2"}

    def source(name):
        parts = name.replace("loops.r0.", "loops.core.").split(".")
        if parts[1] == "layers":
            parts[2] = sources[parts[2]]
        return ".".join(parts)

    plain.load_state_dict({name: theirs[source(name)] for name in plain.state_dict()})
    return plain


def loop_and_routing():
    """A loop with routers equals layers of their own, copied, that go through the same routers."""
    model, ids_BT = routed(), routed_prompt(2)
    plain = unrolled_routed(model)
    for select in ("top", "threshold"):
        assert torch.equal(model(ids_BT, select=select).logits, plain(ids_BT, select=select).logits)
        shallow = model(ids_BT, select=select, loops=1, output_loops=True)
        assert len(shallow.routes) == 1 and not torch.equal(shallow.logits, model(ids_BT, select=select).logits)


def routing_and_sampler():
    model, ids_BT = routed(), routed_prompt(2)
    for options in (SAMPLED, GREEDY | {"num_beams": 3}):
        cached, whole = (generate(model, ids_BT, use_cache=flag, **options) for flag in (True, False))
        assert torch.equal(cached, whole)


def routing_and_speculation():
    model, ids_BT = routed(), routed_prompt()
    assert torch.equal(generate(model, ids_BT, **LOOKUP), generate(model, ids_BT, **GREEDY))


def routing_and_adapters():
    model, ids_BT = routed(), routed_prompt(2)
    before = model(ids_BT, select="threshold").logits
    adapted = with_adapters(model)
    after = adapted(ids_BT, select="threshold").logits
    assert not torch.allclose(after, before, atol=1e-3)
    tokens = generate(adapted, ids_BT, **GREEDY)
    assert torch.equal(tokens, generate(adapted, ids_BT, use_cache=False, **GREEDY))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids_BT, select="threshold").logits, after, atol=1e-5, rtol=1e-5)
    assert torch.equal(generate(merged, ids_BT, **GREEDY), tokens)


HALT = {"halting": HazardHalting(threshold=0.6), "on_exit": "skip"}


def halting():
    return loopwise.set_cache(loopwise.load(Path(__file__).parents[1] / "goldens" / "ouro"), "selected")


def halting_prompt(batch=1):
    ids_BT = torch.arange(5, 5 + 6 * batch).view(batch, 6)
    return torch.cat([ids_BT, ids_BT], dim=1)


def loop_and_halting():
    """A gate that never fires leaves all iterations, one that always fires the first, others save visits."""
    model, ids_BT = halting(), halting_prompt(2)
    never, always = ({"halting": HazardHalting(threshold=q), "on_exit": "skip"} for q in (1.0, 0.0))
    assert torch.equal(model(ids_BT, use_cache=False, **never).logits, model(ids_BT, use_cache=False).logits)
    assert torch.equal(model(ids_BT, use_cache=False, **always).logits, model(ids_BT, use_cache=False, loops=1).logits)
    tokens = []
    model.model.layers[0].register_forward_hook(lambda layer, args, output: tokens.append(output.shape[:2].numel()))
    model(ids_BT, use_cache=False, **HALT)
    assert ids_BT.numel() < sum(tokens) < 4 * ids_BT.numel()


def halting_and_sampler():
    model, ids_BT = halting(), halting_prompt(2)
    for options in (SAMPLED, GREEDY | {"num_beams": 3}):
        cached, whole = (generate(model, ids_BT, use_cache=flag, **HALT, **options) for flag in (True, False))
        assert torch.equal(cached, whole)


def halting_and_speculation():
    model, ids_BT = halting(), halting_prompt()
    assert torch.equal(generate(model, ids_BT, **LOOKUP, **HALT), generate(model, ids_BT, **GREEDY, **HALT))


def halting_and_adapters():
    model, ids_BT = halting(), halting_prompt(2)
    before = model(ids_BT, use_cache=False, **HALT).logits
    adapted = with_adapters(model)
    after = adapted(ids_BT, use_cache=False, **HALT).logits
    assert not torch.allclose(after, before, atol=1e-3)
    tokens = generate(adapted, ids_BT, **GREEDY, **HALT)
    assert torch.equal(tokens, generate(adapted, ids_BT, use_cache=False, **GREEDY, **HALT))


def sharded_training(rank, build, prompt, options):
    """Logits of a rank's own rows and the summed gradients under FSDP2, and the same without it; all-gathers."""
    ids = [prompt(2), prompt(2).flip(1)]
    plain, model = build(), shard(build())
    for ids_BT in ids:
        plain(ids_BT, labels=ids_BT, use_cache=False, **options).loss.backward()
    with count_collectives() as found:
        output = model(ids[rank], labels=ids[rank], use_cache=False, **options)
        output.loss.backward()
        finish_backward(model)
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert (own[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(own[name].grad.full_tensor(), parameter.grad, atol=1e-6, rtol=1e-5)
    assert torch.equal(output.logits, plain(ids[rank], use_cache=False, **options).logits)
    return found.all_gathers


def loop_and_sharding():
    numbers = [on_ranks(sharded_training, looped, prompt, {"loops": loops}) for loops in (2, 16)]
    assert numbers == [[4, 4], [4, 4]]  # root, prelude, core, coda


def halting_and_sharding():
    """Ranks whose tokens leave after different iterations gather no more often than others."""
    assert on_ranks(sharded_training, halting, halting_prompt, HALT) == [2, 2]


def routing_and_sharding():
    assert on_ranks(sharded_training, routed, routed_prompt, {"select": "top"}) == [4, 4]


def sharding_and_adapters():
    assert on_ranks(sharded_training, adapted, prompt, {}) == [4, 4]


def adapted():
    return with_adapters(looped())


def sharded_generation(rank, options):
    """Ranks generate from prompts and to lengths of their own: once gathered, none waits for another."""
    model, ids_BT = looped(), prompt(2 - rank) + rank
    options = options | {"max_new_tokens": 5 + 4 * rank}
    want = generate(model, ids_BT, **options)
    return torch.equal(generate(shard(model), ids_BT, **options), want)


def sampler_and_sharding():
    for options in (SAMPLED, GREEDY | {"num_beams": 3}):
        assert on_ranks(sharded_generation, options) == [True, True]


def sharded_drafts(rank):
    """Without `synced_gpus=False` transformers drafts on after the end wherever a rank is done before the other."""
    model, ids_BT = looped(), prompt() + rank
    assistant = loopwise.attach(tiny_model("llama"), "0 core:(1-4)x1 5")
    want = generate(model, ids_BT, **GREEDY)
    model = shard(model)
    drafts = LOOKUP, GREEDY | {"assistant_model": assistant}
    return [torch.equal(generate(model, ids_BT, synced_gpus=False, **options), want) for options in drafts]


def speculation_and_sharding():
    assert on_ranks(sharded_drafts) == [[True, True]] * 2


def filled(model):
    """Offsets per visit that differ, where fresh ones are zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".relaxation." in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def relaxed():
    return filled(add_relaxation(looped(), 2))


def relaxed_halting():
    return filled(add_relaxation(halting(), 2))


def relaxed_routed():
    return filled(add_relaxation(routed(), 2))


def loop_and_delta():
    """A visit computes with the tensors of its unrolled layer, at full and at smaller depth."""
    model, ids_BT = relaxed(), prompt(2)
    for plan in (PLAN, "0 core:(1-4)x1 5"):
        plain = loopwise.materialize(model, loopwise.Plan.parse(plan))
        counts = loopwise.Plan.parse(plan).counts
        torch.testing.assert_close(model(ids_BT, loops=counts).logits, plain(ids_BT).logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model(ids_BT).logits, looped()(ids_BT).logits)


def delta_and_halting():
    """A gate that never fires leaves all visits, one that always fires the first; others have exact caches."""
    model, ids_BT = relaxed_halting(), halting_prompt(2)
    never, always = ({"halting": HazardHalting(threshold=q), "on_exit": "skip"} for q in (1.0, 0.0))
    assert torch.equal(model(ids_BT, use_cache=False, **never).logits, model(ids_BT, use_cache=False).logits)
    assert torch.equal(model(ids_BT, use_cache=False, **always).logits, model(ids_BT, use_cache=False, loops=1).logits)
    assert not torch.equal(model(ids_BT, **HALT).logits, halting()(ids_BT, **HALT).logits)
    tokens = [generate(model, ids_BT, use_cache=flag, **HALT, **GREEDY) for flag in (True, False)]
    assert torch.equal(*tokens)


def delta_and_routing():
    """Tokens that a router chooses meet the offsets of their visit: layers of their own with these agree."""
    model, ids_BT = relaxed_routed(), routed_prompt(2)
    plain, relaxation = unrolled_routed(model), relaxation_of(model.model.layers[1])
    before = plain(ids_BT, select="top").logits
    for visit in range(3):
        tensors = plain.model.layers[1 + visit].state_dict()
        for name in relaxation.names:
            tensors[name].copy_(relaxation.of(name).applied(tensors[name], visit))
    for select in ("top", "threshold"):
        want = plain(ids_BT, select=select).logits
        torch.testing.assert_close(model(ids_BT, select=select).logits, want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(want, before, atol=1e-3)
    assert torch.equal(*(generate(model, ids_BT, use_cache=flag, **GREEDY) for flag in (True, False)))


def delta_and_sampler():
    model, ids_BT = relaxed(), prompt(2)
    plain = loopwise.materialize(model)
    for options in (SAMPLED, GREEDY | {"num_beams": 3}):
        assert torch.equal(generate(model, ids_BT, **options), generate(plain, ids_BT, **options))


def delta_and_speculation():
    model, ids_BT = relaxed(), prompt()
    want = generate(model, ids_BT, **GREEDY)
    assert torch.equal(generate(model, ids_BT, **LOOKUP), want)
    assistant = loopwise.set_loops(relaxed(), core=1)
    assert torch.equal(generate(model, ids_BT, assistant_model=assistant, **GREEDY), want)


def delta_and_adapters():
    """An adapter adds to the shared layer what it adds without offsets; merged, all is as before."""
    model, ids_BT = with_adapters(relaxed()), prompt(2)
    after = model(ids_BT).logits
    with model.disable_adapter():
        assert torch.equal(model(ids_BT).logits, relaxed()(ids_BT).logits)
    merged = model.merge_and_unload()
    near = {"atol": 1e-5 * after.abs().max().item(), "rtol": 0.0}
    torch.testing.assert_close(merged(ids_BT).logits, after, **near)
    torch.testing.assert_close(loopwise.materialize(merged)(ids_BT).logits, after, **near)


def delta_and_sharding():
    assert on_ranks(sharded_training, relaxed, prompt, {}) == [4, 4]


PRO = LlamaPro(every=1)


def grown(model, operator=PRO, plan=None):
    """What a stage of training makes of a model when it begins."""
    return edit(model, operator, plan=None if plan is None else loopwise.Plan.parse(plan))[0].eval()


def loop_and_growth():
    """loop -> untie -> grow -> tie: nothing changes until the copies do, and tied again they are the shared layers."""
    model, ids_BT = looped(), prompt(2)
    want = model(ids_BT).logits
    untied = grown(looped(), Untie())
    assert torch.equal(untied(ids_BT).logits, want)
    assert torch.equal(grown(untied)(ids_BT).logits, want)
    tied = grown(untied, Tie(plan=PLAN))
    assert torch.equal(tied(ids_BT).logits, want)
    ours, theirs = model.state_dict(), tied.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def growth_and_delta():
    """Layers that become one get the offsets with which the function is the old one; untied they are themselves."""
    model, ids_BT = loopwise.attach(tiny_model("llama"), "0-5"), prompt(2)
    want = model(ids_BT).logits
    near = {"atol": 1e-5 * want.abs().max().item(), "rtol": 0.0}
    recursive = grown(model, Recursive(loops=3, sharing="cycle", init="average", rank=-1))
    assert len(recursive.model.layers) == 2
    torch.testing.assert_close(recursive(ids_BT).logits, want, **near)
    untied = grown(recursive, Untie())
    assert len(untied.model.layers) == 6 and untied.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(untied(ids_BT).logits, want, **near)


def growth_and_halting():
    """Identity layers inside the loop: every token leaves where it left, with what it had."""
    model, ids_BT = halting(), halting_prompt(2)
    want = model(ids_BT, use_cache=False, **HALT).logits
    taller = grown(loopwise.set_loops(halting(), core=1), plan="core:(0-3)x4")
    assert torch.equal(taller(ids_BT, use_cache=False, **HALT).logits, want)
    loopwise.set_cache(taller, "selected")
    tokens = [generate(each, ids_BT, **HALT, **GREEDY) for each in (taller, model)]
    assert torch.equal(*tokens)


def growth_and_routing():
    """Identity layers inside the loop: the routers choose the same tokens."""
    model, ids_BT = routed(), routed_prompt(2)
    taller = grown(loopwise.set_loops(routed(), core=1), plan="0-1 core:(2-3)x3 4-5")
    for select in ("top", "threshold"):
        want = model(ids_BT, select=select, use_cache=False, output_loops=True)
        got = taller(ids_BT, select=select, use_cache=False, output_loops=True)
        assert torch.equal(got.logits, want.logits) and len(got.routes) == len(want.routes) == 3


def growth_and_sampler():
    model, ids_BT = loopwise.attach(tiny_model("llama"), "0-5"), prompt(2)
    taller = grown(model)
    for options in (SAMPLED, GREEDY | {"num_beams": 3}):
        assert torch.equal(generate(taller, ids_BT, **options), generate(model, ids_BT, **options))


def growth_and_speculation():
    """The model before growth drafts for the grown one, and a model drafts for itself by looking up."""
    model, ids_BT = loopwise.attach(tiny_model("llama"), "0-5"), prompt()
    taller = grown(model, Midas(b=2))
    want = generate(taller, ids_BT, **GREEDY)
    assert torch.equal(generate(taller, ids_BT, assistant_model=model, **GREEDY), want)
    assert torch.equal(generate(taller, ids_BT, **LOOKUP), want)


def grown_loop():
    return grown(loopwise.attach(tiny_model("llama"), "0-5"), plan="0 core:(1-10)x2 11")


def growth_and_sharding():
    """A grown model trains in shards like any other; two ranks that grow on the way are in tests/train/test_growth."""
    assert on_ranks(sharded_training, grown_loop, prompt, {}) == [4, 4]


def early_exit_and_batching():
    """A request leaves where it leaves alone, by a gate or without one."""
    for build, ids_BT, rule in ((looped, prompt(2), "latent(0.5)"), (halting, halting_prompt(2), "hazard(0.6)")):
        model, rows = build(), ids_BT.tolist()
        asked = [decoding.Request(prompt=row, max_new_tokens=8, halting=rule) for row in rows]
        options = {"max_new_tokens": 8, "halting": rule, "cache": "copy"}
        assert decoding.answers(model, asked) == decoding.decode_adaptive(build(), rows, **options).tokens


def decoders_and_sharding(decoder):
    assert on_ranks(decoding.shards_decode, looped, decoder) == [True, True]


def test_growth_with_adapters_is_refused_by_name():
    with pytest.raises(ValueError, match="merge them first"):
        grown(loopwise.attach(with_adapters(tiny_model("llama")), "0-5"))


def test_halting_with_routing_is_refused_by_name():
    model, ids_BT = routed(), routed_prompt()
    with pytest.raises(ValueError, match="halting|gate|rout"):
        model(ids_BT, **HALT)


def test_a_decoder_refuses_what_the_matrix_says():
    for build, ids_BT, decoder, message in (
        (routed, routed_prompt(), "early exit", "routers"),
        (routed, routed_prompt(), "wavefront", "routers"),
        (routed, routed_prompt(), "self-speculation", "routers"),
        (relaxed, prompt(), "wavefront", "share weights"),
    ):
        with pytest.raises(ValueError, match=message):
            {"early exit": decoding.exits_early, "wavefront": decoding.waves, "self-speculation": decoding.speculates}[
                decoder
            ](build, ids_BT)
    for decoder in ("wavefront", "speculative"):
        with pytest.raises(ValueError, match="goes with --decoder adaptive"):
            flags = {"cache": None, "exits": None, "draft_loops": None, "lookahead": None, "wave": None}
            Decoding.of(decoder=decoder, halt="hazard(0.5)", **flags)


DECODING = {
    ("loop", "early exit"): lambda: decoding.exits_early(looped, prompt(2)),
    ("growth", "early exit"): lambda: decoding.exits_early(grown_loop, prompt(2)),
    ("tie + delta", "early exit"): lambda: decoding.exits_early(relaxed, prompt(2)),
    ("halting", "early exit"): lambda: decoding.exits_early(halting, halting_prompt(2), "hazard", "hazard(1.0)"),
    ("sampler", "early exit"): lambda: decoding.sampled(
        looped, prompt(2), decoding.decode_adaptive, halting="latent(0)", cache="catch_up"
    ),
    ("early exit", "adapters"): lambda: decoding.exits_early(adapted, prompt(2)),
    ("loop", "wavefront"): lambda: decoding.waves(looped, prompt(2)),
    ("growth", "wavefront"): lambda: decoding.waves(grown_loop, prompt(2)),
    ("sampler", "wavefront"): lambda: decoding.wave_and_sampler(looped, prompt(2)),
    ("wavefront", "adapters"): lambda: decoding.waves(adapted, prompt(2)),
    ("loop", "self-speculation"): lambda: decoding.speculates(looped, prompt(2)),
    ("growth", "self-speculation"): lambda: decoding.speculates(grown_loop, prompt(2)),
    ("tie + delta", "self-speculation"): lambda: decoding.speculates(relaxed, prompt(2)),
    ("sampler", "self-speculation"): lambda: decoding.sampled(
        looped, prompt(2), decoding.decode_speculative, draft_rungs=1
    ),
    ("self-speculation", "adapters"): lambda: decoding.speculates(adapted, prompt(2)),
    ("loop", "depth batching"): lambda: decoding.batches(looped, prompt(2)),
    ("growth", "depth batching"): lambda: decoding.batches(grown_loop, prompt(2)),
    ("tie + delta", "depth batching"): lambda: decoding.batches(relaxed, prompt(2)),
    ("halting", "depth batching"): lambda: decoding.batches(halting, halting_prompt(2)),
    ("routing", "depth batching"): lambda: decoding.batches(routed, routed_prompt(2)),
    ("sampler", "depth batching"): lambda: decoding.batches(looped, prompt(2), decoding.Sampling(temperature=1.5)),
    ("early exit", "depth batching"): early_exit_and_batching,
    ("depth batching", "adapters"): lambda: decoding.batches(adapted, prompt(2)),
} | {
    (name, "sharding"): lambda name=name: decoders_and_sharding(name)
    for name in ("early exit", "wavefront", "self-speculation", "depth batching")
}

LAWS = DECODING | {
    ("loop", "growth"): loop_and_growth,
    ("growth", "tie + delta"): growth_and_delta,
    ("growth", "halting"): growth_and_halting,
    ("growth", "routing"): growth_and_routing,
    ("growth", "sampler"): growth_and_sampler,
    ("growth", "speculation"): growth_and_speculation,
    ("growth", "sharding"): growth_and_sharding,
    ("loop", "tie + delta"): loop_and_delta,
    ("tie + delta", "halting"): delta_and_halting,
    ("tie + delta", "routing"): delta_and_routing,
    ("tie + delta", "sampler"): delta_and_sampler,
    ("tie + delta", "speculation"): delta_and_speculation,
    ("tie + delta", "adapters"): delta_and_adapters,
    ("tie + delta", "sharding"): delta_and_sharding,
    ("loop", "halting"): loop_and_halting,
    ("halting", "sampler"): halting_and_sampler,
    ("halting", "speculation"): halting_and_speculation,
    ("halting", "adapters"): halting_and_adapters,
    ("loop", "routing"): loop_and_routing,
    ("loop", "sampler"): loop_and_sampler,
    ("loop", "speculation"): loop_and_speculation,
    ("loop", "adapters"): loop_and_adapters,
    ("routing", "sampler"): routing_and_sampler,
    ("routing", "speculation"): routing_and_speculation,
    ("routing", "adapters"): routing_and_adapters,
    ("sampler", "speculation"): sampler_and_speculation,
    ("sampler", "adapters"): sampler_and_adapters,
    ("speculation", "adapters"): speculation_and_adapters,
    ("loop", "sharding"): loop_and_sharding,
    ("halting", "sharding"): halting_and_sharding,
    ("routing", "sharding"): routing_and_sharding,
    ("sampler", "sharding"): sampler_and_sharding,
    ("speculation", "sharding"): speculation_and_sharding,
    ("adapters", "sharding"): sharding_and_adapters,
}


def test_every_pair_has_a_law_or_a_reason():
    cells = matrix()
    names = [capability.name for capability in CAPABILITIES]
    assert len(cells) == len(names) * (len(names) - 1) // 2
    assert {pair for pair, cell in cells.items() if cell.status == "runs"} == set(LAWS)
    assert all(cell.reason for cell in cells.values() if cell.status != "runs")


@pytest.mark.parametrize("pair", LAWS, ids=" with ".join)
def test_pair(pair):
    LAWS[pair]()
