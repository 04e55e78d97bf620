"""Language models on text: the Python standard library's own source unless another corpus is named.

`loopwise train looped_text data.source=my_folder` reads your own files; `model.source=...` goes on from a checkpoint.
"""

from __future__ import annotations

from loopwise.loop.depth import CurriculumDepth, PoissonLogNormalDepth
from loopwise.loop.objective import ExpectedObjective, GateObjective
from loopwise.loop.state import NormalState
from loopwise.loop.update import ConcatConfig
from loopwise.train.config import Evaluation, RunConfig, Saving, Stage
from loopwise.train.data.text import TextData
from loopwise.train.models import CheckpointModel, DecoderModel, Loop
from loopwise.train.objectives import LoraConfig
from loopwise.train.optim import AdamWConfig, ConstantSchedule, MuonConfig, WsdSchedule

_LENGTH = 256


def plain_text() -> RunConfig:
    """A plain decoder of 8 layers on text."""
    return _text("plain_text", DecoderModel(layers=8, width=256, heads=4, tie_embeddings=True))


def looped_text() -> RunConfig:
    """4 layers of which the middle two run three times: the depth of 8 layers with the parameters of 4."""
    model = DecoderModel(layers=4, width=256, heads=4, plan="0 core:(1-2)x3 3", tie_embeddings=True)
    return _text("looped_text", model)


def recurrent_depth_text() -> RunConfig:
    """Huginn's recipe (2502.05171): random first state, injection, sampled loop counts, truncated gradient."""
    model = DecoderModel(
        layers=4,
        width=256,
        heads=4,
        plan="0 core:(1-2)x4 3",
        placement="stream",
        loop=Loop(state=NormalState(std=0.02), update=ConcatConfig()),
        tie_embeddings=True,
    )
    depth = CurriculumDepth(sampler=PoissonLogNormalDepth(mean=4, max_grad=4), steps=400)
    return _text("recurrent_depth_text", model, depth=depth, evaluation=Evaluation(every=500, loops=(1, 2, 4, 8, 16)))


def ouro_text() -> RunConfig:
    """Ouro's two stages (2510.25741): expected loss under an exit gate with an entropy bonus, then the gate alone."""
    model = DecoderModel(
        layers=4,
        width=256,
        heads=4,
        placement="branch",
        plan="core:(0-3)x4",
        loop=Loop(turn_norm=True, gate=True),
    )
    stages = (
        Stage(steps=1600, objective=ExpectedObjective(beta=0.1), schedule=WsdSchedule()),
        Stage(steps=400, objective=GateObjective(), trainable=("*.gate.*",), schedule=ConstantSchedule()),
    )
    return _text("ouro_text", model, stages=stages, evaluation=Evaluation(every=500, loops=(1, 2, 3)))


def switch_on_text() -> RunConfig:
    """A plain decoder whose middle starts to loop half-way: a plan change between two stages."""
    model = DecoderModel(layers=4, width=256, heads=4, tie_embeddings=True)
    stages = (Stage(steps=1000, plan="0 core:(1-2)x1 3"), Stage(steps=1000, plan="0 core:(1-2)x3 3"))
    return _text("switch_on_text", model, stages=stages)


def finetune() -> RunConfig:
    """Low-rank adapters on a checkpoint: model.source=FOLDER data.source=TEXTS data.tokenizer=FOLDER, model.plan=..."""
    return RunConfig(
        name="finetune",
        model=CheckpointModel(source=""),
        data=TextData(length=_LENGTH),
        adapters=LoraConfig(),
        steps=200,
        batch_size=8,
        micro_batch=4,
        optimizer=AdamWConfig(lr=2e-4, weight_decay=0.0),
        evaluation=Evaluation(rows=32, samples=2),
        saving=Saving(every=100),
    )


def looped_100m() -> RunConfig:
    """About 100 million parameters, 4 + 8 x 4 + 4 visits, bfloat16: for a GPU."""
    model = DecoderModel(
        layers=16,
        width=768,
        heads=12,
        qk_norm=True,
        plan="0-3 core:(4-11)x4 12-15",
        max_length=1024,
        tie_embeddings=True,
    )
    return _text(
        "looped_100m",
        model,
        data=TextData(length=1024),
        batch_size=64,
        micro_batch=16,
        precision="bfloat16",
        compile=True,
        optimizer=MuonConfig(lr=2e-2),
    )


def _text(name: str, model: DecoderModel, **values) -> RunConfig:
    settings = {
        "data": TextData(length=_LENGTH),
        "steps": 2000,
        "batch_size": 16,
        "optimizer": AdamWConfig(lr=1e-3),
        "schedule": WsdSchedule(),
        "evaluation": Evaluation(every=500, rows=128),
        "saving": Saving(every=500),
    }
    return RunConfig(name=name, model=model, **(settings | values))
