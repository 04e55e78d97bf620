"""How close every family computes to its reference: run by hand with `--write`, it rewrites the committed table.

For every golden, a function that gives all of its expected outputs from the imported model. The table is
`src/loopwise/checkpoints/families.json`, which `loopwise families` prints; `test_parity.py` runs the same.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import loopwise
from loopwise.checkpoints import loading
from loopwise.loop.halting import HazardHalting
from loopwise.models.readouts import exit_distribution, expected_logits, loop_loss

GOLDENS = Path(__file__).parents[1] / "goldens"
TABLE = Path(loopwise.__file__).parent / "checkpoints" / "families.json"
ZERO = torch.zeros(1)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

Tensors = dict[str, torch.Tensor]
Compute = Callable[[Any, Tensors], Tensors]


def with_states(
    model: Any, given: Tensors, loops: Mapping[str, tuple[int, ...]], states_of: tuple[int, ...], name: str
) -> Tensors:
    """Logits at several depths from a zero and a given first state, and states of some depths."""
    found = {}
    for which, start in (("zero", ZERO), ("given", given["input_states"])):
        for r in loops[which]:
            output = model(given["input_ids"], loops=r, initial_state=start, output_loops=True)
            found[f"logits_r{r}_{which}_state"] = output.logits
            if r in states_of:
                found[f"{name}_r{r}_{which}_state"] = torch.stack(output.loop_states)
    return found


def huginn(model: Any, given: Tensors) -> Tensors:
    injected = []
    handle = model.model.loops["core"].update.register_forward_pre_hook(lambda _, args: injected.append(args[1]))
    found = with_states(model, given, dict.fromkeys(("zero", "given"), (1, 2, 4, 8)), (4,), "states")
    handle.remove()
    for which in ("zero", "given"):
        found[f"latent_after_ln_f_r4_{which}_state"] = model.model.norm(found[f"states_r4_{which}_state"][-1])
    return found | {"prelude_output": injected[0]}


def retrofit(model: Any, given: Tensors) -> Tensors:
    found = with_states(model, given, dict.fromkeys(("zero", "given"), (1, 2, 4)), (1, 2, 4), "state")
    return {name: value[-1] if name.startswith("state_") else value for name, value in found.items()}


def parcae(model: Any, given: Tensors) -> Tensors:
    return with_states(model, given, {"zero": (1, 4), "given": (1, 2, 4, 8)}, (4,), "states")


def ouro(model: Any, given: Tensors) -> Tensors:
    ids_BT = given["input_ids"]
    output = model(ids_BT, output_loops=True)
    found = {f"logits_loop{i + 1}": logits for i, logits in enumerate(output.loop_logits)}
    found |= {"logits_default": output.logits, "hidden_loops": torch.stack(output.loop_states)}
    found |= {"gate_lambda": output.gates, "exit_pdf": exit_distribution(output)}
    found["logits_expected"] = expected_logits(output)
    found["loss_hf_labels"] = loop_loss(output, ids_BT, loss="expected_logits")[None]
    for threshold in (0.5, 0.75):
        output = model(ids_BT, halting=HazardHalting(threshold=threshold), on_exit="select")
        found |= {f"logits_threshold_{threshold}": output.logits, f"exit_loop_threshold_{threshold}": output.exits}
    return found


def mor_expert(model: Any, given: Tensors) -> Tensors:
    found: Tensors = {}
    router = model.model.loops["core"].route
    configured = router.capacities
    for which, capacities in (("full", [1.0] * len(configured)), ("hier", configured)):
        router.capacities = capacities
        output = model(given["input_ids"], output_loops=True)
        found[f"logits_cap_{which}"] = output.logits
        for i, (state_BTD, route) in enumerate(zip(output.loop_states, output.routes, strict=True)):
            found[f"hidden_after_depth{i}_cap_{which}"] = state_BTD
            found[f"selected_tokens_depth{i}_cap_{which}"] = route.positions
            scores = route.scores_BT[route.candidates_BT]
            found[f"router_logits_depth{i}_cap_{which}"] = scores.view(len(state_BTD), -1)
    router.capacities = configured
    return found


def mor_token(model: Any, given: Tensors) -> Tensors:
    output = model(given["input_ids"], output_loops=True)
    return {"logits": output.logits, "depth": output.routes[0].depth_BT}


def loopformer(model: Any, given: Tensors) -> Tensors:
    found = {}
    for name, steps in given.items():
        if not name.startswith("steps_"):
            continue
        options = {"loops": len(steps), "schedule": steps}
        found[name.replace("steps", "logits")] = model(given["input_ids"], **options).logits
        hidden = model.model(given["input_ids"], loops=len(steps), loop_options={"schedule": steps}).last_hidden_state
        found[name.replace("steps", "hidden")] = hidden
    return found


def hrm_text(model: Any, given: Tensors) -> Tensors:
    ids_BT = given["input_ids"]
    low, high = model(ids_BT, output_loops="low"), model(ids_BT, output_loops="high")
    return {
        "logits_causal": low.logits,
        "logits_prefix": model(ids_BT, token_type_ids=given["token_type_ids"]).logits,
        "z_L_calls_causal": torch.stack(low.loop_states),
        "z_H_calls_causal": torch.stack(high.loop_states),
    }


def puzzle(model: Any, given: Tensors) -> Tensors:
    found, carry = {}, None
    for k in (1, 2, 3):
        output = model(given["inputs"], given["puzzle_identifiers"], carry, output_embeddings=True)
        carry = output.carry
        found.setdefault("input_embeddings", output.input_embeddings)
        found |= {f"{key}_seg{k}": output[key] for key in ("logits", "q_halt_logits", "q_continue_logits")}
        found |= {f"{stream}_seg{k}": value for stream, value in carry.streams.items()}
    return found


def looped_transformer(model: Any, given: Tensors) -> Tensors:
    points = given["xs"], given["ys"]
    found = {f"predictions_b{r}": model(*points, loops=r) for r in (5, 12)}
    found["predictions_b5_start2"] = model(*points, loops=5, loop_start=2)
    config = model.config.foreign["config"] | {"loop_func": "z=f(x*z)"}
    names = frozenset(model.config.foreign["tensors"])
    product = loading.recognise(config, names).build(config, names).eval()  # type: ignore[union-attr]
    product.load_state_dict(model.state_dict())
    return found | {"predictions_b5_product": product(*points, loops=5)}


def albert(model: Any, given: Tensors) -> Tensors:
    plain = {name: given[name] for name in ("input_ids", "token_type_ids")}
    output, masked = model(**plain, output_hidden_states=True), model(**given)
    return {
        "prediction_logits": output.prediction_logits,
        "sop_logits": output.sop_logits,
        "hidden_states": torch.stack(output.hidden_states),
        "prediction_logits_masked": masked.prediction_logits,
        "sop_logits_masked": masked.sop_logits,
    }


# golden -> how to compute its outputs, largest difference that its reference suggests to allow
CHECKPOINTS: Mapping[str, tuple[Compute, float]] = {
    "albert": (albert, 2e-5),
    "hrm": (puzzle, 2e-5),
    "hrm_text": (hrm_text, 1e-5),
    "huginn": (huginn, 2e-5),
    "looped_transformer": (looped_transformer, 5e-6),
    "loopformer": (loopformer, 3e-5),
    "mor_expert": (mor_expert, 2e-5),
    "mor_token": (mor_token, 2e-5),
    "ouro": (ouro, 2e-5),
    "parcae": (parcae, 2e-5),
    "retrofit_llama": (retrofit, 2e-5),
    "trm_attention": (puzzle, 2e-5),
    "trm_mlp_t": (puzzle, 2e-5),
}


# Outputs that are compared where this input is not 0: what is computed at padding is nobody's.
ONLY_WHERE = {"prediction_logits_masked": "attention_mask"}


@torch.no_grad()
def difference(name: str) -> float:
    """The largest difference over all expected outputs of a golden; integers must be equal.

    Raises:
        AssertionError: an expected output is not computed, one that is computed was not expected, or shapes differ.
    """
    compute, _ = CHECKPOINTS[name]
    given = load_file(GOLDENS / name / "inputs.safetensors")
    found = compute(loopwise.load(GOLDENS / name), given)
    expected = load_file(GOLDENS / name / "expected.safetensors")
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    largest = 0.0
    for key, want in expected.items():
        assert found[key].shape == want.shape, key
        got = found[key]
        if key in ONLY_WHERE:
            where = given[ONLY_WHERE[key]].bool()
            got, want = got[where], want[where]
        if not want.is_floating_point():
            assert torch.equal(got, want), key
            continue
        assert bool(got.isfinite().all()), key
        largest = max(largest, float((got - want).abs().max()))
    return largest


@torch.no_grad()
def cached_equals_uncached(name: str) -> bool | None:
    """Whether greedy decoding with a cache gives the tokens that it gives without; None where nothing is decoded."""
    model = loopwise.load(GOLDENS / name)
    if not hasattr(model, "generate") or not model.can_generate():
        return None
    ids_BT = load_file(GOLDENS / name / "inputs.safetensors")["input_ids"][:, :5]
    starts = [spec.get("state", {}).get("kind") for spec in (model.config.loops or {}).values()]
    options: dict[str, Any] = {"initial_state": ZERO} if "state.normal" in starts else {}
    cached, plain = (model.generate(ids_BT, use_cache=flag, **options, **GREEDY) for flag in (True, False))
    return torch.equal(cached, plain)


def components(config: Any) -> list[str]:
    """What a model of ours consists of: kinds of blocks and loop components, sorted."""
    found = {f"stream.{name}" for name in config.streams or {}}
    for block in config.blocks:
        found |= {
            f"block.{block['placement']}",
            f"mixer.{block['mixer']['kind']}",
            f"mask.{block['mixer'].get('mask')}",
        }
        found |= {"block.adaln"} if block.get("adaln") else set()
    for spec in (config.loops or {}).values():
        found |= {f"norm.{key}" for key in ("entry", "turn", "exit") if spec.get(key)}
        found |= {key for key in ("gate", "exit_projection") if spec.get(key)}
        found |= {"gradient window"} if spec.get("grad") is not None else set()
        found |= {value["kind"] for value in spec.values() if isinstance(value, dict) and "kind" in value}
    return sorted(found - {"mask.None"})


def row(name: str) -> dict[str, Any]:
    """One line of the table."""
    model = loopwise.load(GOLDENS / name)
    family = next(item for item in loading.FAMILIES if item.name == model.config.foreign["family"])
    return {
        "family": family.name,
        "checkpoint": name,
        "plan": str(loopwise.plan_of(model)),
        "components": components(model.config),
        "max_abs_diff": float(f"{difference(name):.2g}"),
        "atol": CHECKPOINTS[name][1],
        "cached_equals_uncached": cached_equals_uncached(name),
        "source": family.source,
        "differs": family.differs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    rows = [row(name) for name in CHECKPOINTS]
    for item in rows:
        cached = item["cached_equals_uncached"]
        print(f"{item['checkpoint']:<20} {item['max_abs_diff']:.1e} of {item['atol']:.0e}, cached {cached}")
    holds = all(item["max_abs_diff"] <= item["atol"] and item["cached_equals_uncached"] is not False for item in rows)
    if write and holds:
        TABLE.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
