"""Runs that grow: exact resume through every edit, what travels, what is promised at the moment, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import loopwise
from loopwise.edit.operators import GradStack, LlamaPro, Midas, Operator
from loopwise.edit.schedule import at_steps, prop_alpha
from loopwise.edit.surgery import Recursive, Tie, Untie
from loopwise.loop import config as components
from loopwise.loop.depth import FixedDepth, PoissonDepth
from loopwise.loop.state import ZerosState
from loopwise.loop.update import AddConfig
from loopwise.tasks.regression import LinearRegression
from loopwise.train import checkpoints
from loopwise.train.config import Evaluation, RunConfig, Stage, override, parse
from loopwise.train.data.generated import RegressionData
from loopwise.train.estimate import estimate_run
from loopwise.train.growth import grow
from loopwise.train.ledger import equal_flop_steps
from loopwise.train.metrics import read_metrics
from loopwise.train.models import DecoderModel, Loop, RegressionModel, TransformersModel
from loopwise.train.objectives import CosineTie, LoraConfig
from loopwise.train.optim import AdamATan2Config, CosineSchedule, MuonConfig, WsdSchedule
from loopwise.train.optim.parametrisation import CompletePParametrisation
from loopwise.train.run import CHECKPOINTS, METRICS, Run
from loopwise.train.stages import lr_factor
from loopwise.train.world import World
from tests.train.ranks import on_ranks
from tests.train.runs import assert_same_state, steps_of, timeless, tiny_config
from tests.train.test_ranks import Trained, assert_close, lines_of, open_run, trained

PLAIN = DecoderModel(layers=2, width=16, heads=2, dropout=0.1)
LOOPED = DecoderModel(layers=3, width=16, heads=2, plan="0 core:(1)x2 2", dropout=0.1)
OFTEN = Evaluation(every=2, rows=8, samples=1)
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def growing(**values: Any) -> RunConfig:
    """Two layers, then three, then four."""
    stages = grow(Midas(b=1), at_steps(6, [2, 4]), moments="halve")
    return tiny_config(**{"model": PLAIN, "depth": None, "stages": stages, "evaluation": OFTEN} | values)


def life_cycle(**values: Any) -> RunConfig:
    """Loop, untie, grow, tie."""
    stages = (
        Stage(steps=2),
        Stage(steps=1, edit=(Untie(),), moments="halve"),
        Stage(steps=2, edit=(Midas(b=1),), moments="zero", lr="rewarm", warmup=2, batch_size=8),
        Stage(steps=2, edit=(Tie(plan="0 core:(1)x3 2"),), moments="halve", lr="rewind"),
    )
    return tiny_config(**{"model": LOOPED, "depth": None, "stages": stages} | values)


def attached(**values: Any) -> RunConfig:
    """A model of transformers that has identity layers put in, is made recursive with offsets, and is untied again."""
    model = TransformersModel(type="llama", config=LLAMA | {"num_key_value_heads": 2})
    stages = (
        Stage(steps=2, edit=(LlamaPro(every=1),), trainable=("model.layers.1.*", "model.layers.3.*")),
        Stage(steps=2, edit=(Recursive(loops=2, sharing="cycle", init="average", rank=1),)),
        Stage(steps=1, edit=(Untie(),), moments="halve"),
    )
    return tiny_config(**{"model": model, "depth": None, "stages": stages} | values)


def points(**values: Any) -> RunConfig:
    """A regressor, whose predictions are read after its loop."""
    model = RegressionModel(layers=2, width=16, heads=2, inputs=3, plan="core:(0-1)x1")
    stages = (Stage(steps=2), Stage(steps=2, edit=(GradStack(b=1),), plan="core:(0-2)x1"))
    data = RegressionData(task=LinearRegression(inputs=3, num_points=4))
    return tiny_config(**{"model": model, "data": data, "depth": None, "stages": stages} | values)


def looped_core(**values: Any) -> RunConfig:
    """A loop with a state and an injection of its own, whose core grows while it runs once."""
    loop = Loop(state=ZerosState(), update=AddConfig())
    model = DecoderModel(layers=2, width=16, heads=2, plan="core:(0-1)x1", loop=loop)
    stages = (Stage(steps=2), Stage(steps=2, edit=(Midas(b=1),), plan="core:(0-2)x3", depth=PoissonDepth(mean=3)))
    return tiny_config(**{"model": model, "depth": None, "stages": stages} | values)


def several(**values: Any) -> RunConfig:
    """Two edits at once, under other optimizers and recomputed loops."""
    stages = (Stage(steps=2), Stage(steps=3, edit=(Untie(), GradStack(b=2)), plan="0-1 core:(2-3)x2 4-5"))
    rest = {"optimizer": MuonConfig(lr=1e-2), "checkpoint_loops": True}
    return tiny_config(**{"model": LOOPED, "depth": None, "stages": stages, **rest} | values)


def atan2(**values: Any) -> RunConfig:
    return growing(optimizer=AdamATan2Config(lr=1e-3), terms=(CosineTie(block=1),), **values)


RUNS = [growing, life_cycle, attached, points, looped_core, several, atan2]


@pytest.mark.parametrize("make", RUNS)
def test_a_growing_run_that_stops_anywhere_goes_on_bit_for_bit(make, tmp_path: Path) -> None:
    whole = Run(make(), tmp_path / "whole")
    expected = steps_of(whole)
    ends = [sum(stage.steps for stage in make().stages[:index]) for index in range(1, len(make().stages))]
    for stop_at in sorted({1, *ends, len(expected) - 1}):  # between stages, and inside the first and the last
        folder = tmp_path / f"stopped-{stop_at}"
        first = steps_of(Run(make(), folder), stop_at)
        torch.manual_seed(stop_at)  # nothing may hang on global generators
        resumed = Run.open(folder)
        assert resumed.carry.step == stop_at
        assert first + steps_of(resumed) == expected
        assert_same_state(resumed.tensors(), whole.tensors())
        lines, other = (list(map(timeless, read_metrics(path / METRICS))) for path in (folder, tmp_path / "whole"))
        assert lines == other


@pytest.mark.parametrize("make", RUNS)
def test_the_grown_model_loads_with_the_weights_that_it_had(make, tmp_path: Path) -> None:
    run = Run(make(), tmp_path / "run")
    steps_of(run)
    model = loopwise.load(tmp_path / "run" / "model")
    with run.averaged():
        assert_same_state(dict(model.state_dict()), dict(run.model.state_dict()))
    plans = loopwise.plan_of(model) or loopwise.plan_of(run.model)
    assert str(plans) == str(loopwise.plan_of(run.model))


def at_stage(config: RunConfig, index: int) -> Run:
    """A run that has made all steps before a stage, and is about to enter it."""
    run = Run(config, None)
    steps_of(run, sum(stage.steps for stage in config.stages[:index]))
    return run


def averages_of(run: Run) -> dict[str, torch.Tensor]:
    assert run.ema is not None
    return {name: tensor.clone() for name, tensor in run.ema.state().items()}


def logits_of(run: Run) -> torch.Tensor:
    run.model.eval()
    with torch.no_grad():
        found = run.model(next(run.held_out(4)).tokens_BT, use_cache=False).logits
    run.model.train()
    return found


def test_untying_keeps_the_function_and_shares_the_moments() -> None:
    run = at_stage(life_cycle(), 1)
    before, state = logits_of(run), {name: tensor.clone() for name, tensor in run.optimizer.state().items()}
    averages = averages_of(run)
    growth = run.begin_stage(1)["growth"]
    assert torch.equal(logits_of(run), before) and growth["loss_jump"] == 0
    assert (growth["edit"], growth["plan_before"], growth["plan"]) == (["untie()"], "0 core:(1)x2 2", "0-3")
    assert growth["parameters_after"] > growth["parameters_before"]
    after, sources = run.optimizer.state(), {0: 0, 1: 1, 2: 1, 3: 2}
    for key, tensor in after.items():
        parts = key.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else None
        old = state[key if layer is None else ".".join([*parts[:2], str(sources[layer]), *parts[3:]])]
        power = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2}[key.rpartition("/")[2]]
        assert old.any(), "moments of a trained model"
        assert torch.equal(tensor, old / 2**power if layer in (1, 2) else old), key
    for key, tensor in averages_of(run).items():
        parts = key.split(".")
        source = key if parts[1] != "layers" else ".".join([*parts[:2], str(sources[int(parts[2])]), *parts[3:]])
        assert torch.equal(tensor, averages[source])


def test_zeroed_layers_keep_the_function() -> None:
    config = growing(stages=(Stage(steps=2), Stage(steps=1, edit=(LlamaPro(every=1),))))
    run = at_stage(config, 1)
    before = logits_of(run)
    assert run.begin_stage(1)["growth"]["loss_jump"] == 0
    assert torch.equal(logits_of(run), before)
    state = run.optimizer.state()
    mine = {key: tensor for key, tensor in state.items() if key.startswith("model.layers.1.")}
    assert not any(tensor.any() for key, tensor in mine.items() if key.endswith("/exp_avg"))
    assert all(tensor.all() for key, tensor in mine.items() if key.endswith("/step"))


@pytest.mark.parametrize("moments", ["copy", "zero", "reset", "halve"])
def test_every_choice_of_moments_goes_on_learning(moments) -> None:
    stages = (Stage(steps=2), Stage(steps=3, edit=(Midas(b=1),), moments=moments))
    run = at_stage(growing(stages=stages), 1)
    counts = {float(tensor) for key, tensor in run.optimizer.state().items() if key.endswith("/step")}
    run.begin_stage(1)
    after = {float(tensor) for key, tensor in run.optimizer.state().items() if key.endswith("/step")}
    assert counts == {2.0} and after == ({0.0} if moments == "reset" else {2.0})
    assert all(value["loss"] < 3 for value in steps_of(run))


def test_reset_drops_what_old_parameters_had_too() -> None:
    run = at_stage(growing(stages=(Stage(steps=2), Stage(steps=1, edit=(Midas(b=1),), moments="reset"))), 1)
    run.begin_stage(1)
    assert not any(tensor.any() for tensor in run.optimizer.state().values())


def test_groups_and_multipliers_follow_the_source() -> None:
    """Also where the depth that CompleteP reads has doubled: factors are frozen, so that the function is."""
    model = replace(PLAIN, width=32, dropout=0.0)
    config = growing(model=model, parametrisation=CompletePParametrisation(base_width=16, base_depth=1, alpha=0.5))
    run = at_stage(config, 1)

    def settings() -> dict[str, tuple[float, ...]]:
        return {
            name: (group["base_lr"], group["weight_decay"], group["eps"])
            for group in run.optimizer.groups
            for name in group["names"]
        }

    before = settings()
    run.begin_stage(1)
    after = settings()
    assert len(set(before.values())) > 3
    for name, values in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str({0: 0, 1: 0, 2: 1}[int(parts[2])])
        assert values == before[".".join(parts)], name
    scales = [block["branch_scale"] for block in run.model.config.blocks]
    assert len(scales) == 3 and set(scales) == {2**-0.5}


def test_rates_continue_rewarm_and_rewind() -> None:
    schedule = CosineSchedule(warmup=10, floor=0.0)
    stages = (
        Stage(steps=40),
        Stage(steps=20, edit=(Midas(b=1),), lr="rewarm", warmup=4),
        Stage(steps=20, edit=(Midas(b=1),), lr="rewind"),
        Stage(steps=20, edit=(Midas(b=1),)),
    )
    config = growing(stages=stages, schedule=schedule)
    found = [lr_factor(config, step) for step in range(100)]
    plain = [schedule.factor(step, 100) for step in range(100)]
    assert found[:40] == plain[:40] and found[44:60] == plain[44:60]
    assert found[40:44] == [plain[40 + n] * (n + 1) / 4 for n in range(4)]
    assert found[60] == 1.0, "back where the warm-up had ended"
    assert found[60:] == [schedule.factor(10 + n, 50) for n in range(40)]
    stable = growing(stages=stages, schedule=WsdSchedule(warmup=0.1, decay=10))
    assert [lr_factor(stable, step) for step in (59, 60, 89, 99)] == [1.0, 1.0, 1.0, pytest.approx(0.1)]


def test_the_ledger_is_the_estimate_and_full_depth_is_what_a_plain_run_spends() -> None:
    config = growing()
    run = Run(config, None)
    values = steps_of(run)
    full = Run(growing(model=replace(PLAIN, layers=4), stages=()), None)
    steps_of(full)
    assert values[-1]["flops_full"] == pytest.approx(full.carry.flops, rel=1e-12)
    assert full.carry.flops_full == full.carry.flops > run.carry.flops
    found = estimate_run(config, device="cpu", flops_per_second=1e9)
    assert found.flops_full == pytest.approx(full.carry.flops, rel=1e-12)
    assert any("at full depth" in line for line in found.lines())
    assert equal_flop_steps(full.config, config) == round(6 * run.carry.flops / full.carry.flops) < 6
    with pytest.raises(ValueError, match="tiny has 3 stages: equal FLOPs need a run of one stage"):
        equal_flop_steps(config, full.config)
    assert found.flops == pytest.approx(run.carry.flops, rel=1e-12)
    assert found.plans == ("0-1", "0-2", "0-3")
    assert found.parameters_unique == sum(item.numel() for item in run.model.parameters())
    assert found.memory.moments == sum(item.nbytes for item in run.optimizer.state().values())


def test_full_depth_draws_the_loop_counts_of_the_last_stage() -> None:
    """A loop that is switched on later: full cost is that of the loop from the start, at the depths of its draws."""
    late = PoissonDepth(mean=3, max_grad=2)
    stages = (Stage(steps=2, plan="0 core:(1)x1 2"), Stage(steps=2, plan="0 core:(1)x3 2", depth=late))
    config = tiny_config(model=replace(LOOPED, dropout=0.0), depth=None, stages=stages)
    switched = steps_of(Run(config, None))[-1]
    always = steps_of(Run(replace(config, stages=(Stage(steps=4, plan="0 core:(1)x3 2", depth=late),)), None))[-1]
    assert switched["flops_full"] == always["flops"] > switched["flops"]


def test_growth_is_written_once_into_the_metrics(tmp_path: Path) -> None:
    run = Run(growing(log_every=100), tmp_path / "run")
    steps_of(run, 3)
    meta = checkpoints.read_meta(checkpoints.steps(tmp_path / "run" / CHECKPOINTS)[3])
    assert meta["edits"] == [[], ["midas(b=1)"]] and meta["stage"] == 1 and meta["plan"] == "0-2"
    steps_of(Run.open(tmp_path / "run"))
    lines = [line for line in read_metrics(tmp_path / "run" / METRICS) if "growth" in line]
    assert [line["step"] for line in lines] == [3, 5]
    first = lines[0]["growth"]
    assert first["loss_jump"] == first["loss_after"] - first["loss_before"] != 0


def test_checkpoints_of_earlier_versions_load(tmp_path: Path) -> None:
    run = Run(tiny_config(), tmp_path / "run")
    expected = steps_of(run)
    early = Run(tiny_config(), tmp_path / "early")
    steps_of(early, 2)
    meta = {name: value for name, value in vars(early.carry).items() if name != "flops_full"}
    meta |= {"plan": "0 core:(1)x3 2", "fingerprint": early.source.fingerprint}
    checkpoints.drop_after(tmp_path / "early" / CHECKPOINTS, 0)
    checkpoints.save(tmp_path / "early" / CHECKPOINTS, 2, early.tensors(), meta)
    assert steps_of(Run.open(tmp_path / "early")) == expected[2:]


def test_stages_are_read_from_json_and_words() -> None:
    config = life_cycle()
    assert parse(components.to_dict(config)) == config
    plain = growing(stages=(Stage(steps=2), Stage(steps=2)))
    for word in (
        "stages.1.edit=midas(2)",
        'stages.1.edit=["midas(b=2)"]',
        'stages.1.edit=[{"kind":"edit.midas","b":2}]',
    ):
        assert override(plain, [word]).stages[1].edit == (Midas(b=2),)
    two = override(plain, ['stages.1.edit=["untie", "midas(1)"]', "stages.1.moments=reset"]).stages[1]
    assert two.edit == (Untie(), Midas(b=1)) and two.moments == "reset"
    with pytest.raises(ValueError, match="did you mean 'midas'"):
        override(plain, ["stages.1.edit=midsa(2)"])


EDIT = (Midas(b=1),)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: growing(stages=grow(Midas(b=2), at_steps(6, [2, 4]))), None),
        (lambda: growing(stages=grow(Midas(b=3), at_steps(6, [2]))), r"stages\.1: edit\.midas: b=3 does not divide 2"),
        (
            lambda: growing(stages=grow([Midas(b=1), LlamaPro(every=2)], at_steps(6, [2, 4]))),
            r"stages\.2: edit\.llama_pro: every=2 does not divide 3 layers",
        ),
        (
            lambda: growing(stages=(Stage(steps=1), Stage(steps=1, edit=EDIT, plan="0-7"))),
            r"stages\.1: .*layer",
        ),
        (
            lambda: growing(stages=(Stage(steps=1), Stage(steps=1, edit=EDIT, trainable=("*.layers.7.*",)))),
            r"stages\.1: trainable='\*\.layers\.7\.\*' matches no parameter",
        ),
        (
            lambda: life_cycle(evaluation=Evaluation(rows=8, loops=(1, 4))),
            r"stages\.1: evaluation\.loops has 1, .*no loop",
        ),
        (lambda: life_cycle(depth=FixedDepth(total=2)), r"stages\.1: depth\.fixed draws loop counts, .*no loop"),
        (
            lambda: growing(stages=(Stage(steps=1), Stage(steps=1, edit=EDIT)), terms=(CosineTie(block=2),)),
            r"block=2",
        ),
        (lambda: looped_core(stages=(Stage(steps=1), Stage(steps=1, edit=(Untie(),)))), r"stages\.1: .*loop"),
        (lambda: growing(adapters=LoraConfig()), "adapters=.* do not go with stages that edit the model"),
        (lambda: Stage(steps=1, moments="zero"), "moments='zero' move with an edit"),
        (lambda: Stage(steps=1, mode="tie"), "mode='tie'"),
        (lambda: Stage(steps=2, lr="rewarm"), "warmup=0 must be 1 to steps"),
        (lambda: Stage(steps=2, warmup=1), "warmup=1 is read with lr='rewarm' only"),
        (lambda: Stage(steps=2, lr="rewind", schedule=WsdSchedule()), "lr='rewind'"),
        (lambda: grow([Midas(b=1)], prop_alpha(100, 4, 1)), "1 operators for 3 edits"),
        (
            lambda: growing(stages=(Stage(steps=1, edit=(Unknown(),)),)),
            r"stages\.0: Unknown: stages edit the depth",
        ),
    ],
)
def test_runs_that_cannot_grow_are_refused_before_the_first_step(make, words: str | None, tmp_path: Path) -> None:
    if words is None:
        assert Run(make(), None).carry.step == 0
        return
    with pytest.raises(ValueError, match=words):
        made = make()
        Run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Unknown(Operator):
    """An operator that is none of depth; without a kind, so that no list of operators has it."""


ON_RANKS = {
    "ddp": growing(evaluation=OFTEN),
    "fsdp": life_cycle(evaluation=OFTEN, parallel="fsdp", checkpoint_loops=True),
    "attached": attached(parallel="fsdp", ema=None),
    "muon": several(parallel="fsdp"),
}
STOPS = {"ddp": (3,), "fsdp": (2, 4), "attached": (3,), "muon": (2,)}


def through_and_stopped(rank: int, folder: Path) -> dict[str, list[Trained]]:
    """Every run to its end, and to some steps: where a stage ends, and inside of one."""
    return {
        name: [
            trained(open_run(rank, config, folder / name / "whole")),
            *(trained(open_run(rank, config, folder / name / str(stop)), stop) for stop in STOPS[name]),
        ]
        for name, config in ON_RANKS.items()
    }


def gone_on_with(rank: int, folder: Path) -> dict[str, list[Trained]]:
    torch.manual_seed(99 + rank)
    world = World(rank, 2, torch.device("cpu"))
    return {
        name: [trained(Run.open(folder / name / str(stop), world=world)) for stop in stops]
        for name, stops in STOPS.items()
    }


@pytest.mark.slow
def test_two_ranks_grow_alike_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    begun, rest = (on_ranks(each, tmp_path) for each in (through_and_stopped, gone_on_with))
    for name, config in ON_RANKS.items():
        whole, *firsts = begun[0][name]
        assert begun[1][name][0][0] == whole[0], name
        assert_same_state(begun[1][name][0][1], whole[1])
        for stop, first, after in zip(STOPS[name], firsts, rest[0][name], strict=True):
            assert first[0] + after[0] == whole[0], (name, stop)
            assert_same_state(after[1], whole[1])
            assert lines_of(tmp_path / name / str(stop)) == lines_of(tmp_path / name / "whole")
        alone = trained(Run(config, None))
        if config.parallel == "ddp":
            assert whole[0] == alone[0]
            assert_same_state(whole[1], alone[1])
        else:
            numbers = [[flat(values) for values in found[0]] for found in (whole, alone)]
            assert_close((numbers[0], whole[1]), (numbers[1], alone[1]))
    # What two ranks saved in the middle of a later stage goes on in one process, and the other way round.
    steps_of(Run(ON_RANKS["ddp"], tmp_path / "one"), 3)
    expected = trained(Run(ON_RANKS["ddp"], None))
    for values, state in on_ranks(the_rest, tmp_path / "one"):
        assert values == expected[0][3:]
        assert_same_state(state, expected[1])


def the_rest(rank: int, folder: Path) -> Trained:
    return trained(Run.open(folder, world=World(rank, 2, torch.device("cpu"))))


def flat(values: dict[str, Any]) -> dict[str, float]:
    """Numbers of a step, those of a growth among them."""
    growth = {f"growth/{name}": value for name, value in values.get("growth", {}).items()}
    return {
        name: value for name, value in (values | growth).items() if isinstance(value, int | float) and name != "growth"
    }


@pytest.mark.slow
def test_compiled_layers_grow_and_go_on(tmp_path: Path) -> None:
    stages = grow(Midas(b=1), at_steps(4, [2]))
    config = growing(compile=True, model=replace(PLAIN, layers=1, dropout=0.0), stages=stages, ema=None)
    expected = steps_of(Run(config, None))
    steps_of(Run(config, tmp_path / "run"), 3)
    assert steps_of(Run.open(tmp_path / "run")) == expected[3:]
    for one, other in zip(expected, steps_of(Run(replace(config, compile=False), None)), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
