"""Training a model with a plan: checkpointing, adapters, and the Trainer of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from laws import assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_inputs, tiny_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import loopwise
from loopwise.models.hub import layer_list
from loopwise.models.playing import looping_of
from tests.models.common import LOOPED

CHECKPOINTED = [
    "llama",
    "gpt2",
    "bloom",
    "gemma3_text",
    "mixtral",
    "mamba",
    "mamba2",
    "falcon_h1",
    "qwen3_next",
    "lfm2",
    "opt",
    "bert",
]


def looped(model_type="llama", plan=LOOPED):
    model = tiny_model(model_type)
    return loopwise.attach(model, plan), tiny_inputs(model)


def logits(model, ids_BT, **options):
    with torch.no_grad():
        return model(input_ids=ids_BT, **options).logits


def gradients(model, ids_BT):
    model.zero_grad()
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def lora(model, **options):
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:  # B is zero at first: an adapter without effect shows nothing
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", CHECKPOINTED)
def test_gradient_checkpointing_changes_no_gradient(model_type, reentrant):
    model, ids_BT = looped(model_type)
    model.train()
    want = gradients(model, ids_BT)
    runs = {}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for child in layer_list(model).layers[1].children():
        child.register_forward_hook(lambda module, *_: runs.update({module: runs.get(module, 0) + 1}))
    got = gradients(model, ids_BT)
    assert max(runs.values()) == 4, "layer 1 must run twice per visit: forward, and again for the backward pass"
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert_close(got[name], gradient, name)
    model.gradient_checkpointing_disable()
    model.eval()
    assert torch.equal(logits(model, ids_BT), logits(looped(model_type)[0], ids_BT))


def test_gradients_accumulate_over_iterations_of_a_step():
    """Two calls of different depth before one backward pass each: no call disturbs the graph of another."""
    model, ids_BT = looped()
    first, second = (gradients(loopwise.set_loops(model, count), ids_BT) for count in (1, 3))
    model.zero_grad()
    (model(ids_BT, labels=ids_BT, loops=1).loss + model(ids_BT, labels=ids_BT, loops=3).loss).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, first[name] + second[name], name)


def test_frozen_layers_get_no_gradient():
    model, ids_BT = looped()
    model.model.layers[2].requires_grad_(False)
    found = gradients(model, ids_BT)
    assert not any(name.startswith("model.layers.2.") for name in found)
    assert any(name.startswith("model.layers.1.") for name in found)


def test_lora_before_and_after_attach_give_the_same_model():
    ids_BT = tiny_inputs(tiny_model("llama"))
    before = loopwise.attach(lora(tiny_model("llama")), LOOPED)
    after = lora(loopwise.attach(tiny_model("llama"), LOOPED))
    assert isinstance(before, PeftModel) and isinstance(after, PeftModel)
    assert torch.equal(logits(before, ids_BT), logits(after, ids_BT))
    assert torch.equal(logits(before, ids_BT, loops=3), logits(after, ids_BT, loops=3))
    assert not torch.allclose(logits(after, ids_BT, loops=3), logits(after, ids_BT))
    base = loopwise.attach(tiny_model("llama"), LOOPED)
    assert not torch.allclose(logits(before, ids_BT), logits(base, ids_BT), atol=1e-3), "the adapter has no effect"
    with before.disable_adapter(), after.disable_adapter():
        assert torch.equal(logits(before, ids_BT), logits(base, ids_BT))
        assert torch.equal(logits(after, ids_BT), logits(base, ids_BT))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(before.generate(input_ids=ids_BT, **options), after.generate(input_ids=ids_BT, **options))


@pytest.mark.parametrize("order", ["lora first", "attach first"])
def test_merged_adapters_keep_the_plan(order):
    ids_BT = tiny_inputs(tiny_model("llama"))
    if order == "lora first":
        model = loopwise.attach(lora(tiny_model("llama")), LOOPED)
    else:
        model = lora(loopwise.attach(tiny_model("llama"), LOOPED))
    want = logits(model, ids_BT), logits(model, ids_BT, loops=3)
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny_model("llama")) and str(loopwise.plan_of(merged)) == LOOPED
    assert_close(logits(merged, ids_BT), want[0], "merged")
    assert_close(logits(merged, ids_BT, loops=3), want[1], "merged, three iterations")
    assert_close(logits(loopwise.materialize(merged), ids_BT), want[0], "merged and unrolled")
    loopwise.detach(merged)
    assert loopwise.plan_of(merged) is None


@pytest.mark.parametrize("order", ["lora first", "attach first"])
def test_detach_under_an_adapter(order):
    model = lora(tiny_model("llama"))
    ids_BT = tiny_inputs(tiny_model("llama"))
    want = logits(model, ids_BT)
    model = (
        loopwise.attach(model, LOOPED) if order == "lora first" else lora(loopwise.attach(tiny_model("llama"), LOOPED))
    )
    loopwise.detach(model)
    assert looping_of(model) is None
    assert torch.equal(logits(model, ids_BT), want)


@pytest.mark.parametrize("order", ["lora first", "attach first"])
def test_a_step_with_lora_changes_adapters_only(order):
    ids_BT = tiny_inputs(tiny_model("llama"))
    if order == "lora first":
        model = loopwise.attach(lora(tiny_model("llama")), LOOPED)
    else:
        model = lora(loopwise.attach(tiny_model("llama"), LOOPED))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_gradient_of_an_adapter_in_a_loop_is_the_sum_over_visits():
    ids_BT = tiny_inputs(tiny_model("llama"))
    model = loopwise.attach(lora(tiny_model("llama")), LOOPED)
    plan = loopwise.plan_of(model)
    got = gradients(model, ids_BT)
    twin = lora(loopwise.materialize(loopwise.attach(tiny_model("llama"), LOOPED)))
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, parameter in twin.named_parameters():
            if "lora_" in name:
                head, index, rest = split(name)
                parameter.copy_(own[f"{head}{plan.layers[index]}{rest}"])
    sums = {}
    for name, gradient in gradients(twin, ids_BT).items():
        head, index, rest = split(name)
        source = f"{head}{plan.layers[index]}{rest}"
        sums[source] = sums.get(source, 0) + gradient
    assert got.keys() == sums.keys()
    for name, gradient in got.items():
        assert_close(gradient, sums[name], name)


def split(name):
    """`a.layers.3.b` -> (`a.layers.`, 3, `.b`)."""
    head, _, tail = name.partition(".layers.")
    index, _, rest = tail.partition(".")
    return f"{head}.layers.", int(index), f".{rest}"


def test_materialising_with_adapters_is_refused_by_name():
    model = loopwise.attach(lora(tiny_model("llama")), LOOPED)
    with pytest.raises(ValueError, match="merge_and_unload"):
        loopwise.materialize(model)
    assert torch.isfinite(logits(model, tiny_inputs(tiny_model("llama")))).all()


def test_adapters_saved_by_peft_load_onto_a_looped_model(tmp_path):
    ids_BT = tiny_inputs(tiny_model("llama"))
    model = loopwise.attach(lora(tiny_model("llama")), LOOPED)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loopwise.attach(tiny_model("llama"), LOOPED), tmp_path / "adapter")
    assert torch.equal(logits(again, ids_BT), logits(model, ids_BT))


class Rows(Dataset):
    def __init__(self, ids_BT):
        self.ids_BT = ids_BT

    def __len__(self):
        return len(self.ids_BT)

    def __getitem__(self, index):
        return {"input_ids": self.ids_BT[index], "labels": self.ids_BT[index]}


def arguments(folder, **options):
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 3, "logging_steps": 1, "report_to": []}
    settings |= {"use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, "optim": "adamw_torch", "seed": 0}
    return TrainingArguments(output_dir=str(folder), **(settings | options))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba2", "mixtral"])
def test_three_steps_of_trainer_and_its_checkpoint(model_type, tmp_path):
    model, _ = looped(model_type)
    rows = Rows(tiny_inputs(model, batch=6))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and torch.isfinite(torch.tensor(losses)).all()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))

    folder = tmp_path / "checkpoint-3"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "loopwise" and config["plan"] == LOOPED
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is type(model) and loopwise.plan_of(again) == loopwise.plan_of(model)
    ids_BT = tiny_inputs(model)
    assert torch.equal(logits(again, ids_BT), logits(model.eval(), ids_BT))


def test_trainer_resumes_from_its_checkpoint_bit_for_bit(tmp_path):
    rows = Rows(tiny_inputs(tiny_model("llama"), batch=8))

    def run(folder, **options):
        model, _ = looped()
        trainer = Trainer(model=model, args=arguments(folder, save_steps=2, max_steps=4), train_dataset=rows)
        trainer.train(**options)
        return model

    whole = run(tmp_path)
    resumed = run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, parameter), again in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, again), name


def test_trainer_with_checkpointing_and_lora(tmp_path):
    model = lora(loopwise.attach(tiny_model("llama"), LOOPED))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = Rows(tiny_inputs(tiny_model("llama"), batch=6))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
