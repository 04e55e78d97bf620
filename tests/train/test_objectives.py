"""Objectives against naive oracles: values, gradients, parts that add up, and what is refused by name.

Shapes: B rows, T tokens, N scored positions, V vocabulary, R iterations.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from laws import assert_close
from tiny import tiny_inputs, tiny_model

import loopwise
from loopwise.loop import readout
from loopwise.loop.act import ActHalting
from loopwise.loop.config import from_dict, to_dict
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.objective import (
    ActObjective,
    DeepSupervisionObjective,
    ExpectedObjective,
    FinalObjective,
    GateObjective,
    LastMeanObjective,
    PonderObjective,
    ShortcutObjective,
)
from loopwise.loop.state import NormalState
from loopwise.loop.update import AddConfig, ConcatConfig
from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.readouts import loop_loss
from loopwise.models.universal import universal_transformer
from loopwise.train.batch import IGNORE, Batch, Points
from loopwise.train.models import DecoderModel, Loop, RegressionModel
from loopwise.train.objectives import (
    CosineTie,
    Distillation,
    LoraConfig,
    ZLoss,
    build_terms,
    check_objective,
    compute_loss,
    document_positions,
    forward_at,
    trainable,
)
from loopwise.train.objectives.cosine_tie import similarity

SIZES = {"layers": 2, "width": 16, "heads": 2, "plan": "core:(0-1)x3", "init_std": 0.3}
COUNT = LoopCount(no_grad=1, grad=3)
OBJECTIVES = [
    FinalObjective(),
    LastMeanObjective(window=2),
    DeepSupervisionObjective(weights="linear"),
    ExpectedObjective(),
    GateObjective(),
    PonderObjective(),
    ShortcutObjective(),
]


def build(config=DecoderModel, vocab=13, **fields):
    sizes = {"loop": Loop(gate=True, update=AddConfig())} | SIZES | fields
    return config(**sizes).build(vocab, seed=0)[0]


def batch(num_rows=4, num_tokens=6, vocab=13):
    generator = torch.Generator().manual_seed(1)
    tokens_BT, targets_BT = (torch.randint(0, vocab, (num_rows, num_tokens), generator=generator) for _ in range(2))
    targets_BT[torch.rand(targets_BT.shape, generator=generator) < 0.6] = IGNORE
    targets_BT[0] = IGNORE  # a row without a target
    targets_BT[:, 1] = IGNORE  # and a column
    return Batch(tokens_BT=tokens_BT, targets_BT=targets_BT)


def attached(model_type="llama", plan="0 core:(1-4)x2 5"):
    model = loopwise.attach(tiny_model(model_type), plan).train()
    return model, batch(vocab=tiny_inputs(model).max().item() + 1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance=2e-5):
    assert {n for n, g in got.items() if g.any()} == {n for n, g in want.items() if g.any()}
    scale = max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in want.items():
        if name in got:
            error = float((got[name] - gradient).abs().max())
            assert error <= tolerance * scale, f"{name}: {error:.2g} of {scale:.2g}"


def naive_mean(values_BT, targets_BT, num_items=None):
    """One position after the other."""
    total, found = 0.0, 0
    for row in range(len(targets_BT)):
        for t in range(targets_BT.shape[1]):
            if targets_BT[row, t] != IGNORE:
                total, found = total + values_BT[row, t], found + 1
    return total / (num_items or found)


def naive_losses(logits_BTV, targets_BT):
    log_BTV = logits_BTV.log_softmax(-1)
    return -log_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]


def naive(model, rows, objective, count=COUNT):
    """An objective from its formula, on a forward that computes every logit; no helper of the objectives is used."""
    options = {"use_cache": False, "loops": count, "output_loops": True}
    output = model(input_ids=rows.tokens_BT, **options)
    losses = [naive_losses(logits_BTV, rows.targets_BT) for logits_BTV in output.loop_logits]
    lambdas = output.gate_logits.sigmoid().unbind(-1)
    left, pdf = 1.0, []
    for i, value in enumerate(lambdas):
        pdf.append(left if i + 1 == len(lambdas) else left * value)
        left = left * (1 - value)
    match objective:
        case FinalObjective():
            value = losses[-1]
        case LastMeanObjective():
            value = (losses[-1] + losses[-2]) / 2
        case DeepSupervisionObjective():
            value = sum((i + 1) * loss for i, loss in enumerate(losses)) / sum(range(1, len(losses) + 1))
        case ExpectedObjective():
            value = sum(p * loss + 0.1 * p * p.log() for p, loss in zip(pdf, losses, strict=True))
        case GateObjective():
            value = 0.0
            for before, after, gate in zip(losses, losses[1:], lambdas[1:], strict=False):
                goal = torch.sigmoid(50 * ((before - after).clamp(min=0) - 0.005)).detach()
                value = value - (goal * (1 - gate).log() + (1 - goal) * gate.log()) / len(losses)
        case PonderObjective():
            prior = [0.2 * 0.8**n for n in range(len(losses))]
            prior = [value / sum(prior) for value in prior]
            value = sum(
                p * loss + 0.01 * p * (p.log() - math.log(q)) for p, loss, q in zip(pdf, losses, prior, strict=True)
            )
    return naive_mean(value, rows.targets_BT)


@pytest.mark.parametrize("objective", OBJECTIVES[:-1], ids=lambda o: o.kind)
def test_every_objective_is_its_formula_with_its_gradient(objective):
    model, rows = build(), batch()
    want = naive(model, rows, objective)
    got, stats = compute_loss(model, rows, objective=objective, count=COUNT)
    assert_close(got, want, "loss")
    assert float(stats["iterations"]) == COUNT.total and torch.equal(stats["loss"], got.detach())
    assert_same(gradients(model, got), gradients(model, naive(model, rows, objective)))
    losses = [value for name, value in stats.items() if name.startswith("loss@")]
    assert len(losses) == (COUNT.total if objective.every_iteration else 0)
    final = naive(model, rows, FinalObjective())
    assert_close(stats["task_loss"], final.detach(), "task loss")
    assert not losses or torch.equal(losses[-1], stats["task_loss"])


@pytest.mark.parametrize("rows_each", [1, 3])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.kind)
def test_micro_batches_add_up_to_the_batch(objective, rows_each):
    model, rows = build(loop=Loop(gate=True, state=NormalState(std=0.5), update=ConcatConfig())), batch()
    terms = build_terms(model, [ZLoss(weight=0.1), CosineTie(block=1)])
    options = {"objective": objective, "terms": terms, "count": COUNT, "seed": 3, "step": 7}
    whole, stats = compute_loss(model, rows, **options)
    want = gradients(model, whole)
    total, summed = 0.0, dict.fromkeys(stats, 0.0)
    for number, micro in enumerate(rows.micro(rows_each)):
        part, found = compute_loss(model, micro, num_items=rows.num_items, first_row=number * rows_each, **options)
        total = total + part
        for name in summed:
            summed[name] += float(found[name])
    assert_close(total, whole, "loss")
    assert summed == pytest.approx({name: float(value) for name, value in stats.items()}, rel=1e-4)
    assert_same(gradients(model, total), want)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba2", "bert"])
def test_the_final_objective_of_transformers_models(model_type):
    model, rows = attached(model_type)
    got, _ = compute_loss(model, rows, objective=FinalObjective(), count=LoopCount(no_grad=0, grad=3))
    want = F.cross_entropy(
        model(input_ids=rows.tokens_BT, loops=3).logits.flatten(0, 1), rows.targets_BT.flatten(), ignore_index=IGNORE
    )
    assert_close(got, want, "loss")
    assert_same(gradients(model, got), gradients(model, want))
    sizes = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:2]))
    compute_loss(model, rows, objective=FinalObjective())
    columns = int((rows.targets_BT != IGNORE).any(0).sum())
    assert model_type == "bert" or sizes == [(4, columns)], "columns without a target have no logits"


def test_depths_per_row_in_the_loss():
    model, rows = build(loop=Loop(state=NormalState(std=0.5), update=ConcatConfig())), batch()
    counts = LoopCounts(no_grad_B=torch.tensor([0, 2, 1, 0]), grad_B=torch.tensor([1, 1, 2, 3]))
    options = {"objective": FinalObjective(), "num_items": rows.num_items, "seed": 5}
    got, stats = compute_loss(model, rows, count=counts, **options)
    want, iterations = 0.0, 0.0
    for row in range(4):
        count = LoopCount(no_grad=int(counts.no_grad_B[row]), grad=int(counts.grad_B[row]))
        part, found = compute_loss(model, rows.rows(row, row + 1), count=count, first_row=row, **options)
        want, iterations = want + part, iterations + float(found["iterations"])
    assert_close(got, want, "loss")
    assert float(stats["iterations"]) == pytest.approx(iterations)
    assert_same(gradients(model, got), gradients(model, want))


def test_a_batch_without_a_target_has_no_loss_and_no_gradient():
    model, rows = build(), batch().rows(0, 1)
    loss, stats = compute_loss(model, rows, objective=ExpectedObjective(), terms=[ZLoss(), CosineTie(block=1)])
    assert loss.item() == 0 and all(math.isfinite(float(value)) for value in stats.values())
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


def test_adaptive_computation_time_learns_from_its_ponder_cost():
    sizes = {"vocab_size": 13, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12, "num_iterations": 4}
    torch.manual_seed(0)
    model, rows = LoopwiseForCausalLM(universal_transformer(halting=ActHalting(), **sizes)).train(), batch()
    got, stats = compute_loss(model, rows, objective=ActObjective(weight=0.5))
    output = model(input_ids=rows.tokens_BT, on_exit="select", use_cache=False)
    want = naive_mean(naive_losses(output.logits, rows.targets_BT) + 0.5 * output.ponder, rows.targets_BT)
    assert_close(got, want, "loss")
    assert_close(stats["iterations"], naive_mean(output.exits + 1.0, rows.targets_BT), "iterations")
    assert_same(gradients(model, got), gradients(model, want))


def test_a_shorter_schedule_is_drawn_and_joined():
    model, rows = build(), batch()
    objective = ShortcutObjective(short_weight=0.3, consistency_weight=0.7)
    drawn = {step: objective.short(4, seed=1, step=step) for step in range(60)}
    assert set(drawn.values()) == {1, 2, 3} and drawn == {step: objective.short(4, seed=1, step=step) for step in drawn}
    assert objective.short(1, seed=1, step=0) is None
    long, short = (
        model(input_ids=rows.tokens_BT, loops=count, use_cache=False)
        for count in (COUNT, LoopCount.split(drawn[5], COUNT.grad))
    )
    parts = [naive_mean(naive_losses(output.logits, rows.targets_BT), rows.targets_BT) for output in (long, short)]
    square_BT = (long.last_hidden_state.detach() - short.last_hidden_state).square().mean(-1)
    want = parts[0] + 0.3 * parts[1] + 0.7 * naive_mean(square_BT, rows.targets_BT)
    got, _ = compute_loss(model, rows, objective=objective, count=COUNT, seed=1, step=5)
    assert_close(got, want, "loss")
    assert_same(gradients(model, got), gradients(model, want))
    other, its_rows = attached()
    assert torch.isfinite(compute_loss(other, its_rows, objective=objective)[0])


def test_regression_is_the_mean_square_of_the_last_iterations():
    model = build(RegressionModel, 0, plan="core:(0-1)x5", inputs=3, loop=Loop(update=AddConfig()))
    xs_BNI = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    rows = Batch(points=Points(xs_BNI=xs_BNI, ys_BN=xs_BNI.sum(-1)))
    predicted_RBN = model(xs_BNI, xs_BNI.sum(-1), loops=6, loop_start=4)
    want = (predicted_RBN - xs_BNI.sum(-1)).square().mean()
    count = LoopCount(no_grad=4, grad=2)
    got, stats = compute_loss(model, rows, objective=LastMeanObjective(window=2), count=count)
    assert_close(got, want, "loss")
    assert_same(gradients(model, got), gradients(model, want))
    assert set(stats) == {"loss", "task_loss", "loss@5", "loss@6", "iterations"}
    halves = [
        compute_loss(model, part, objective=LastMeanObjective(window=2), count=count, num_items=rows.num_items)[0]
        for part in rows.micro(2)
    ]
    assert_close(sum(halves), got, "halves")


def test_a_step_of_the_cosine_tie_makes_layers_more_alike():
    """The sign: what is printed in the paper would drive them apart."""
    for model, rows, block in ((build(layers=4, plan="0-3", loop=None), batch(), 2), (*attached("gpt2", "0-5"), 3)):
        layers = model.model.layers if hasattr(model, "model") else model.transformer.h
        before = similarity(layers, block)
        cosines = [
            F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
            for first, second in zip(layers, layers[block:], strict=False)
            for (_, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True)
            if a.ndim >= 2
        ]
        assert_close(before, torch.stack(cosines).mean(), "mean over groups of equal size")
        term = CosineTie(block=block, weight=40.0)
        with_term, stats = compute_loss(model, rows, objective=FinalObjective(), terms=[term])
        without, _ = compute_loss(model, rows, objective=FinalObjective())
        assert_close(stats["cosine_tie"], 40 * (1 - before.detach()), "term")
        (with_term - without).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        assert similarity(layers, block).item() > before.item() + 1e-3


def test_tied_layers_have_no_cosine_loss_and_a_group_is_a_name():
    model = build(layers=4, plan="0-3", loop=None)
    layers = model.model.layers
    for first, second in zip(layers, layers[2:], strict=False):
        second.load_state_dict(first.state_dict())
    _, stats = compute_loss(model, batch(), objective=FinalObjective(), terms=[CosineTie(block=2)])
    assert abs(float(stats["cosine_tie"])) < 1e-5
    for fields, reason in (({"block": 4}, "leaves no two layers"), ({"block": 0}, "must be at least 1")):
        with pytest.raises(ValueError, match=reason):
            CosineTie(**fields).build(model)


def test_distillation_is_zero_for_the_teacher_itself_and_pulls_a_student(tmp_path):
    teacher, rows = build(), batch()
    loopwise.save(teacher, tmp_path)
    term = Distillation(teacher=str(tmp_path), temperature=2.0, weight=0.5)
    student = build()
    [built] = build_terms(student, [term])
    _, stats = compute_loss(student, rows, objective=FinalObjective(), terms=[built])
    assert abs(float(stats["distillation"])) < 1e-6
    with torch.no_grad():
        student.lm_head.weight.add_(
            torch.randn(student.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    loss, stats = compute_loss(student, rows, objective=FinalObjective(), terms=[built])
    mine_BTV, other_BTV = (model(rows.tokens_BT).logits / 2.0 for model in (student, teacher))
    divergence_BT = (other_BTV.softmax(-1) * (other_BTV.log_softmax(-1) - mine_BTV.log_softmax(-1))).sum(-1)
    assert_close(stats["distillation"], 0.5 * 4 * naive_mean(divergence_BT, rows.targets_BT).detach(), "term")
    assert_close(loss.detach(), stats["task_loss"] + stats["distillation"], "loss")
    other = build(vocab=17)
    with pytest.raises(ValueError, match="predicts 13 token ids, the model 17"):
        term.build(other)


def test_the_z_loss_is_its_formula():
    model, rows = build(), batch()
    got, stats = compute_loss(model, rows, objective=FinalObjective(), terms=[ZLoss(weight=0.3)])
    normaliser_BT = model(rows.tokens_BT, use_cache=False).logits.exp().sum(-1).log()
    assert_close(stats["z"], 0.3 * naive_mean(normaliser_BT**2, rows.targets_BT).detach(), "term")
    assert_close(got.detach(), stats["task_loss"] + stats["z"], "loss")


def test_the_second_stage_of_ouro_moves_the_gate_alone():
    model, rows = build(), batch()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.lm_head.weight.requires_grad_(False)
    with trainable(model, ["*.gate.*"]) as names:
        loss, _ = compute_loss(model, rows, objective=GateObjective(), count=COUNT)
        found = gradients(model, loss)
        assert set(found) == set(names) and len(names) == 2
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(names)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.weight"], "as it was before"
    with pytest.raises(ValueError, match="'gates' matches no parameter"), trainable(model, ["gates"]):
        pass


@pytest.mark.parametrize("kind", ["ours", "llama", "gpt2"])
def test_adapters_start_at_the_model_and_learn_alone(kind):
    model, rows = (build(), batch()) if kind == "ours" else attached(kind)
    targets = {"ours": ("q_proj", "down_proj"), "llama": (), "gpt2": ("c_attn",)}[kind]
    want, _ = compute_loss(model, rows, objective=FinalObjective())
    adapted = LoraConfig(r=2, targets=targets).build(model, seed=1)
    loss, _ = compute_loss(adapted, rows, objective=FinalObjective(), count=LoopCount(no_grad=0, grad=3))
    again, _ = compute_loss(adapted, rows, objective=FinalObjective())
    assert_close(again, want, "loss")
    found = gradients(adapted, loss)
    assert found and all("lora_" in name for name in found)
    layers = {name.split("lora_")[0].rpartition("layers.")[2].rpartition("h.")[2].split(".")[0] for name in found}
    assert len(layers) == (2 if kind == "ours" else 6)


def test_the_gradient_of_an_adapter_in_our_loop_is_the_sum_over_visits():
    adapted, rows = LoraConfig(r=2, targets=("q_proj",)).build(build(loop=Loop()), seed=1), batch()
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                pairs[name] = parameter
    got = gradients(adapted, compute_loss(adapted, rows, objective=FinalObjective())[0])
    twin = build(loop=None, layers=6, plan="0-5")  # every visit has a layer of its own, whose adapter is merged
    merged = adapted.merge_adapter() or adapted.base_model.model
    own = {name.replace(".base_layer", ""): p for name, p in merged.named_parameters() if "lora_" not in name}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            head, _, rest = name.partition("layers.")
            index, _, tail = rest.partition(".")
            parameter.copy_(own[f"{head}layers.{int(index) % 2}.{tail}" if rest else name])
    adapted.unmerge_adapter()
    want = gradients(twin, compute_loss(twin, rows, objective=FinalObjective())[0])
    scale = 16.0 / 2
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.mixer.q_proj"
        a, b = (pairs[f"{prefix}.lora_{side}.default.weight"] for side in "AB")
        weight = sum(want[f"model.layers.{visit}.mixer.q_proj.weight"] for visit in range(layer, 6, 2))
        assert_close(got[f"{prefix}.lora_A.default.weight"], scale * b.T @ weight, "A", 1e-4)
        assert_close(got[f"{prefix}.lora_B.default.weight"], scale * weight @ a.T, "B", 1e-4)


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_packed_documents_are_what_they_are_alone(kind):
    model, rows = (build(), batch()) if kind == "ours" else attached()
    assert rows.tokens_BT is not None and rows.targets_BT is not None
    segments_BT = torch.tensor([[0, 0, 1, 1, 1, 2]]).expand(4, -1)
    packed = Batch(tokens_BT=rows.tokens_BT, targets_BT=rows.targets_BT, segments_BT=segments_BT)
    assert document_positions(packed).tolist()[0] == [0, 1, 0, 1, 2, 0]
    got = forward_at(model, packed, scored=False).logits
    for first, stop in ((0, 2), (2, 5), (5, 6)):
        part = Batch(tokens_BT=rows.tokens_BT[:, first:stop], targets_BT=rows.targets_BT[:, first:stop])
        assert_close(got[:, first:stop], forward_at(model, part, scored=False).logits, "a document")
    mamba, its_rows = attached("mamba2")
    packed = Batch(tokens_BT=its_rows.tokens_BT, targets_BT=its_rows.targets_BT, segments_BT=segments_BT)
    with pytest.raises(ValueError, match="does not keep packed documents apart"):
        forward_at(mamba, packed)


def test_aligned_targets_and_shifted_labels_are_one_loss():
    model, rows = build(), batch()
    output = model(rows.tokens_BT, output_loops=True)
    for loss in ("expected", "final", "expected_logits"):
        shifted = loop_loss(output, rows.tokens_BT, loss=loss)
        assert torch.equal(loop_loss(output, targets=readout.shift_labels(rows.tokens_BT), loss=loss), shifted)
    with pytest.raises(ValueError, match="give either labels"):
        loop_loss(output)


def test_what_a_model_does_not_offer_is_named():
    model, rows = attached()
    no_gate, coda, flat = build(loop=Loop()), build(plan="core:(0)x2 1", loop=None), build(plan="0-1", loop=None)
    points = Batch(points=Points(xs_BNI=torch.zeros(1, 2, 3), ys_BN=torch.zeros(1, 2)))
    regression = build(RegressionModel, 0, inputs=3, loop=Loop())
    counts = LoopCounts(no_grad_B=torch.zeros(4, dtype=torch.long), grad_B=torch.arange(1, 5))
    for other, objective, count, reason in (
        (model, LastMeanObjective(window=2), None, "readout.last_mean reads every iteration, which LlamaForCausalLM"),
        (no_gate, ExpectedObjective(), None, "readout.expected needs an exit gate: give the loop core gate=true"),
        (coda, DeepSupervisionObjective(), None, "has layers after the loop core"),
        (flat, LastMeanObjective(window=1), None, "has no named loop"),
        (flat, ShortcutObjective(), None, "has no loop"),
        (no_gate, LastMeanObjective(window=2), counts, "needs one depth for all rows"),
        (regression, ShortcutObjective(), None, "use readout.last_mean for points"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_objective(other, objective, count)
        with pytest.raises(ValueError, match=reason):
            compute_loss(other, points if other is regression else rows, objective=objective, count=count)
    with pytest.raises(ValueError, match="LoopwiseForRegression reads points, the batch holds tokens"):
        forward_at(regression, rows)
    with pytest.raises(ValueError, match="loss.z reads logits, a model of points has none"):
        compute_loss(regression, points, objective=FinalObjective(), terms=[ZLoss()])
    with pytest.raises(ValueError, match="readout.act: ponder_BT is missing"):
        compute_loss(no_gate, batch(), objective=ActObjective())
    with pytest.raises(ValueError, match="loss.z is given twice"):
        build_terms(no_gate, [ZLoss(), ZLoss()])
    with pytest.raises(ValueError, match="targets has 'q_prj'; did you mean 'q_proj'"):
        LoraConfig(targets=("q_prj",)).build(no_gate)


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # what an import of an absent package meets
    with pytest.raises(ValueError, match="adapters.lora needs the package peft"):
        LoraConfig().build(build())


def test_configs_survive_json():
    for config in (
        *OBJECTIVES,
        CosineTie(block=4),
        Distillation(teacher="x"),
        ZLoss(),
        LoraConfig(targets=("q_proj",)),
    ):
        assert from_dict(to_dict(config)) == config
