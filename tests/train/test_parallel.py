"""Two ranks are one process: replicated bit for bit, sharded to rounding, with collectives that loops do not multiply.

Every comparison is with one process that runs the ranks' rows as micro-batches. Shapes: B rows, T tokens.
"""

from __future__ import annotations

import copy
import shutil
from functools import cache

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import tiny_inputs, tiny_model
from torch.distributed.tensor import DTensor

import loopwise
from loopwise.loop.window import GradientWindow
from loopwise.models.attach import set_hooks
from loopwise.models.blocks import BlockConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.mixers import AttentionConfig
from loopwise.models.mlps import MLPConfig
from loopwise.plan import Plan
from loopwise.train.parallel import (
    agree_on_loops,
    checkpoint_loops,
    compile_blocks,
    count_collectives,
    finish_backward,
    replicate,
    reshard,
    shard,
    units_of,
    without_sync,
)
from tests.train.ranks import on_ranks

PLAN = "0 core:(1-2)x4 3-5"


def llama():
    return loopwise.attach(tiny_model("llama"), PLAN).train()


def rows(rank, number=0):
    return tiny_inputs(tiny_model("llama"), batch=2, length=8, seed=10 * rank + number)


def loss_of(model, ids_BT, **options):
    """The sum of the losses of the rows of one rank over the number of targets of both."""
    logits = model(input_ids=ids_BT, use_cache=False, **options).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum") / 28


def step(model, rank, **options):
    """One step of SGD on a rank; returns gradients and new parameters, whole."""
    loss_of(model, rows(rank), **options).backward()
    finish_backward(model)
    return after(model)


def after(model):
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return grads, {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def alone(model, **options):
    """The same step in one process."""
    for rank in range(2):
        loss_of(model, rows(rank), **options).backward()
    return after(model)


def assert_close(got, want, tolerance):
    for found, expected in zip(got, want, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), name


def replicated(rank):
    model = llama()
    if rank is None:
        return model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(float(rank))  # replicate() makes the others like the first
    return replicate(model)


def replicated_step(rank):
    return step(replicated(rank), rank)


def test_replicated_ranks_equal_one_process_bit_for_bit():
    want = alone(llama())
    for got in on_ranks(replicated_step):
        assert_close(got, want, 0.0)


def half_used(rank):
    model = llama()
    first, second, third = list(model.parameters())[:3]
    first.grad = torch.full_like(first, 1.0 + rank)
    second.grad = torch.ones_like(second) if rank else None
    with count_collectives() as found:
        finish_backward(model)
    return first.grad, second.grad, third.grad, found.all_reduces


def test_a_parameter_that_few_ranks_use():
    for first, second, third, num_sums in on_ranks(half_used):
        assert (first == 3).all() and (second == 1).all() and third is None
        assert num_sums == 2


def wrapped(rank):
    model = torch.nn.parallel.DistributedDataParallel(llama())
    loss_of(model, rows(rank)).backward()
    return {name: 2 * parameter.grad for name, parameter in model.module.named_parameters()}  # it averages


def test_the_wrapper_of_torch_works_too():
    want = alone(llama())[0]
    for got in on_ranks(wrapped):
        assert_close([got], [want], 1e-6)


RECURRENT = {"update": {"kind": "update.concat"}, "turn": "norm", "gate": True}


def recurrent(**core):
    """A decoder of our own: tied embeddings, a loop with parameters, learned positions."""
    block = BlockConfig(hidden_size=16, mixer=AttentionConfig(num_heads=2), mlp=MLPConfig(intermediate_size=24))
    config = LoopwiseDecoderConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=4,
        blocks=[block.to_dict()],
        plan="0 core:(1-2)x4 3",
        loops={"core": RECURRENT | core},
        norm={"type": "rms"},
        num_positions=8,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LoopwiseForCausalLM(config).train()


def sharded(rank):
    return llama() if rank is None else shard(llama())


def sharded_checkpointed(rank):
    return llama() if rank is None else shard(checkpoint_loops(llama()))


def sharded_recurrent(rank):
    return recurrent() if rank is None else shard(recurrent())


def sharded_recurrent_checkpointed(rank):
    return recurrent() if rank is None else shard(checkpoint_loops(recurrent()))


def sharded_window(rank):
    model = recurrent(grad=2)
    return model if rank is None else shard(checkpoint_loops(model))


def sharded_window_of_hooks(rank):
    model = llama()
    set_hooks(model, [GradientWindow(loopwise.plan_of(model), {"core": 1})])
    return model if rank is None else shard(model)


def sharded_compiled(rank):
    return llama() if rank is None else shard(checkpoint_loops(compile_blocks(llama(), backend="aot_eager")))


def sharded_adapters(rank):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config).train()
    return model if rank is None else shard(checkpoint_loops(model))


def sharded_skipping(rank):
    """A plan that visits a core layer outside of its loop, and one layer never."""
    model = loopwise.attach(tiny_model("llama"), "0 core:(1-2)x2 2 4-5").train()
    return model if rank is None else shard(model)


SHARDED = [
    sharded,
    sharded_checkpointed,
    sharded_recurrent,
    sharded_recurrent_checkpointed,
    sharded_window,
    sharded_window_of_hooks,
    sharded_compiled,
    sharded_adapters,
    sharded_skipping,
]


def every_step(rank):
    return {build.__name__: step(build(rank), rank) for build in SHARDED}


@cache
def sharded_steps():
    return on_ranks(every_step)


@pytest.mark.parametrize("build", SHARDED, ids=lambda build: build.__name__)
def test_sharded_ranks_equal_one_process(build):
    want = alone(build(None))
    for found in sharded_steps():
        assert_close(found[build.__name__], want, 1e-6)


def two_steps(rank, build):
    model = build(rank)
    names = [name for name, _ in model.named_parameters()]
    step(model, rank)
    with torch.no_grad():  # an evaluation in between leaves nothing behind
        model(input_ids=rows(rank), use_cache=False, loops=3)
    reshard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    model.zero_grad()
    got = step(model, rank, loops=2)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return got, whole(norm), names


def test_a_second_step_after_an_evaluation_and_with_other_loops():
    build = sharded_recurrent_checkpointed
    model = build(None)
    alone(model)
    model.zero_grad()
    want = alone(model, loops=2)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    for got, found, names in on_ranks(two_steps, build):
        assert_close(got, want, 1e-6)
        torch.testing.assert_close(found, norm)
        assert names == [name for name, _ in model.named_parameters()]


COUNTED = [sharded, sharded_recurrent_checkpointed, sharded_window]


def counted(rank):
    """(all-gathers, reduce-scatters, all-reduces) of steps with 2, 2 and 16 iterations of the core."""
    found = {}
    for build in COUNTED:
        model = build(rank)
        found[build.__name__] = []
        for loops in (2, 2, 16):  # twice, as the first step might also do what is done once
            model.zero_grad()
            with count_collectives() as collectives:
                loss_of(model, rows(rank), loops=loops).backward()
                finish_backward(model)
            found[build.__name__].append(
                (collectives.all_gathers, collectives.reduce_scatters, collectives.all_reduces)
            )
    return found


def test_collectives_do_not_grow_with_iterations():
    for found in on_ranks(counted):
        print(f"(all-gathers, reduce-scatters, all-reduces) of 2, 2, 16 iterations: {found}")
        assert found == {build.__name__: [(4, 4, 0)] * 3 for build in COUNTED}, "root, prelude, core, coda: once each"


def accumulated(rank, build, loops):
    model = build(rank)
    with count_collectives() as collectives:
        with without_sync(model):
            loss_of(model, rows(rank), loops=loops).backward()
        loss_of(model, rows(rank, 1), loops=loops).backward()
        finish_backward(model)
    grads = after(model)[0]
    return grads, collectives.all_gathers, collectives.reduce_scatters, collectives.all_reduces


# Shards of the core are sent twice: what was kept, as soon as the last backward pass touches it, and what that adds.
@pytest.mark.parametrize("loops", [2, 16])
@pytest.mark.parametrize("build, counts", [(sharded, (4, 5, 0)), (replicated, (0, 0, 2))])
def test_accumulated_gradients_are_sent_once(build, counts, loops):
    model = llama()
    for rank in range(2):
        for number in range(2):
            loss_of(model, rows(rank, number), loops=loops).backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    for got, *found in on_ranks(accumulated, build, loops):
        assert_close([got], [want], 1e-6)
        assert tuple(found) == counts


def saved(rank, folder):
    model = shard(recurrent())
    loss_of(model, rows(rank)).backward()
    finish_backward(model)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    return {name: whole(value) for name, value in model.state_dict().items()}


def test_a_checkpoint_of_shards_loads_in_one_process(tmp_path):
    want = on_ranks(saved, str(tmp_path / "step"))[0]
    model = recurrent()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(tmp_path / "step"), no_dist=True)
    assert state.keys() == want.keys()
    assert_close([state], [want], 0.0)
    assert torch.equal(model(rows(0)).logits, recurrent()(rows(0)).logits)


def agreeing(rank, loops):
    try:
        agree_on_loops(llama(), loops[rank])
    except ValueError as error:
        return str(error)
    return None


def test_ranks_agree_on_loops():
    assert on_ranks(agreeing, (3, 3)) == [None, None]
    for message in on_ranks(agreeing, (2, 3)):
        assert "'core': 2} on rank 0" in message and "'core': 3} on rank 1" in message


def in_bfloat16(rank):
    model = shard(llama(), param_dtype=torch.bfloat16)
    output = model(input_ids=rows(rank), use_cache=False)
    output.logits.float().square().mean().backward()
    finish_backward(model)
    types = {parameter.dtype for parameter in model.parameters()} | {p.grad.dtype for p in model.parameters()}
    return output.logits.dtype, types


def test_computing_in_bfloat16_keeps_parameters_and_gradients():
    for logits, types in on_ranks(in_bfloat16):
        assert logits == torch.bfloat16 and types == {torch.float32}


@pytest.mark.parametrize(
    "plan, units",
    [
        ("0-1 core:(2-5)x8 6-7", [[0, 1], [2, 3, 4, 5], [6, 7]]),
        ("(0-2)x3", [[0, 1, 2]]),
        ("0-2", [[0], [1], [2]]),
        ("0-3 2-5", [[0, 1], [2, 3], [4, 5]]),
        ("0 (1)x2 3 (4)x2 6", [[0], [1, 4], [3, 6]]),
    ],
)
def test_units(plan, units):
    assert units_of(Plan.parse(plan)) == units


def counting_backend(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("window", [False, True])
def test_no_number_of_iterations_compiles_again(window):
    torch._dynamo.reset()
    graphs, model, twin = [], llama(), llama()
    for each in (model, twin):
        if window:
            set_hooks(each, [GradientWindow(loopwise.plan_of(each), {"core": 1})])
    names = [*model.state_dict()]
    compile_blocks(model, backend=counting_backend(graphs), fullgraph=True)
    seen = []
    for loops in (1, 2, 3, 5, 8, 13):
        assert_close(alone(model, loops=loops), alone(twin, loops=loops), 1e-6)
        model.zero_grad(), twin.zero_grad()
        seen.append(len(graphs))
    print(f"graphs after six loop counts: {seen}")
    assert seen[1] == seen[-1] <= 4
    assert [*model.state_dict()] == names
    assert torch.equal(copy.deepcopy(model)(rows(0)).logits, twin(rows(0)).logits)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor():
    torch._dynamo.reset()
    model, twin = (loopwise.attach(tiny_model("llama", num_layers=1), "core:(0)x2").train() for _ in range(2))
    assert_close(alone(compile_blocks(checkpoint_loops(model))), alone(twin), 1e-5)


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler") as error:
        compile_blocks(llama())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", [shard, compile_blocks, checkpoint_loops, agree_on_loops])
def test_a_model_without_a_plan_is_refused(function):
    with pytest.raises(ValueError, match="has no plan"):
        function(tiny_model("llama"))


@pytest.mark.parametrize("function", [shard, replicate])
def test_ranks_need_a_process_group(function):
    with pytest.raises(ValueError, match="torchrun"):
        function(llama())
    finish_backward(llama())
    agree_on_loops(llama(), 3)
