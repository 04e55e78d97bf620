"""Checks of plain transformers on the tiny models: what holds here is what loopwise may be held to."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from dataclasses import dataclass, field

import torch
from tiny import QUIRKS, UNAVAILABLE, tiny_inputs, tiny_model
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

PROMPT, NEW_TOKENS = 6, 6
TOLERANCE = 1e-5  # times the largest logit


@dataclass(kw_only=True)
class Report:
    """Measured on one type: largest absolute differences of logits, and problems as short words."""

    model_type: str
    class_name: str = ""
    num_parameters: int = 0
    build_seconds: float = 0.0
    causal: float = 0.0
    cached: float = 0.0
    batch: float = 0.0
    reach: float = 0.0
    weakest_layer: float = 0.0
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        words = {(False, False): "ok", (True, False): "PROBLEM", (True, True): "QUIRK", (False, True): "LOST"}
        word = words[bool(self.problems), self.model_type in QUIRKS]
        return (
            f"{self.model_type:26s} {word:8s} {self.num_parameters:7d} {self.build_seconds:5.2f}s "
            f"causal {self.causal:.0e} cached {self.cached:.0e} batch {self.batch:.0e} "
            f"reach {self.reach:.0e} layer {self.weakest_layer:.0e} {self.class_name} {'; '.join(self.problems)}"
        )


def _generate(model: PreTrainedModel, ids_BT: torch.Tensor, *, use_cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens `[B, T + new]` and the logits `[B, new, V]` they were chosen from."""
    if type(model).generate is not GenerationMixin.generate:
        return _generate_by_hand(model, ids_BT, use_cache=use_cache)
    out = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def _generate_by_hand(
    model: PreTrainedModel, ids_BT: torch.Tensor, *, use_cache: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with calls of `forward`, for classes whose own `generate` is for another modality."""
    steps, cache = [], {}
    for _ in range(NEW_TOKENS):
        out = model(ids_BT[:, -1:] if cache else ids_BT, use_cache=use_cache, **cache)
        steps.append(out.logits[:, -1])
        ids_BT = torch.cat([ids_BT, steps[-1].argmax(-1, keepdim=True)], dim=1)
        if use_cache:
            cache = {"past_key_values": out.past_key_values}
    return ids_BT, torch.stack(steps, dim=1)


def _layer_effects(model: PreTrainedModel, ids_BT: torch.Tensor, logits_BTV: torch.Tensor) -> list[float]:
    """How far the logits move when one layer's matrices are perturbed, for every list of at least two layers."""
    generator = torch.Generator().manual_seed(7)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == _num_layers(model)]
    effects = []
    for layer in lists[0] if lists else ():
        saved = [(p, p.detach().clone()) for p in layer.parameters() if p.dim() >= 2]
        for parameter, _ in saved:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        effects.append(float((model(ids_BT).logits - logits_BTV).abs().max()))
        for parameter, before in saved:
            parameter.copy_(before)
    return effects


def _num_layers(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    for name in ("num_layers_per_stack", "decoder_layers", "num_layers", "num_hidden_layers"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return 0


@torch.no_grad()
def check(model_type: str, seed: int = 0) -> Report:
    """Build one type and measure it; problems are listed, never raised, except while building."""
    report = Report(model_type=model_type)
    start = time.perf_counter()
    model = tiny_model(model_type, seed=seed)
    report.build_seconds = time.perf_counter() - start
    report.class_name = type(model).__name__
    report.num_parameters = sum(p.numel() for p in model.parameters())
    twin = tiny_model(model_type, seed=seed).state_dict()
    if any(not torch.equal(tensor, twin[name]) for name, tensor in model.state_dict().items()):
        report.problems.append("not deterministic by seed")

    ids_BT = tiny_inputs(model)
    logits_BTV = model(ids_BT).logits
    if logits_BTV.shape[:2] != ids_BT.shape or not torch.isfinite(logits_BTV).all():
        report.problems.append(f"bad logits {tuple(logits_BTV.shape)}")
    if not torch.equal(logits_BTV, model(ids_BT).logits):
        report.problems.append("two calls differ")
    for position in (9, 5):
        changed = ids_BT.clone()
        changed[:, position] = 5 + (changed[:, position] - 4) % 90
        difference = (model(changed).logits - logits_BTV).abs()
        report.causal = max(report.causal, float(difference[:, :position].max()))
    # Not exactly zero: the experts of a mixture see groups of tokens of other sizes, and kernels round by shape.
    if report.causal > TOLERANCE * float(logits_BTV.abs().max()):
        report.problems.append("not causal")

    changed = ids_BT.clone()
    changed[:, 0] = 5 + (changed[:, 0] - 4) % 90
    report.reach = float((model(changed).logits - logits_BTV)[:, -1].abs().max())
    if report.reach < 1e-3:
        report.problems.append("the first token does not reach the last")

    effects = _layer_effects(model, ids_BT, logits_BTV)
    report.weakest_layer = min(effects, default=0.0)
    if report.weakest_layer < 1e-3:
        report.problems.append(f"layers without effect: {[i for i, e in enumerate(effects) if e < 1e-3] or 'no list'}")
    _check_generation(model, ids_BT, logits_BTV, report)
    return report


def _check_generation(model: PreTrainedModel, ids_BT: torch.Tensor, logits_BTV: torch.Tensor, report: Report) -> None:
    tolerance = TOLERANCE * float(logits_BTV.abs().max())
    prompt_BT = ids_BT[:, :PROMPT]
    try:
        plain_tokens, plain_logits = _generate(model, prompt_BT, use_cache=False)
    except Exception as error:  # any failure of plain transformers is the finding
        report.problems.append(f"uncached generate: {type(error).__name__}: {str(error)[:90]}")
        return
    try:
        tokens, logits = _generate(model, prompt_BT, use_cache=True)
        report.cached = float((logits - plain_logits).abs().max())
        if not torch.equal(tokens, plain_tokens) or report.cached > tolerance:
            report.problems.append("cached != uncached")
        alone_tokens, alone_logits = _generate(model, prompt_BT[1:], use_cache=True)
        report.batch = float((logits[1:] - alone_logits).abs().max())
        if not torch.equal(tokens[1:], alone_tokens) or report.batch > tolerance:
            report.problems.append("batch decode != row alone")
    except Exception as error:
        report.problems.append(f"cached generate: {type(error).__name__}: {str(error)[:90]}")


def main(model_types: list[str]) -> int:
    """Print one line per type; 1 when a type fails, has a finding outside `QUIRKS`, or has lost its quirk."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # matrices this small only lose time to a second thread
    start, built, clean, unexpected = time.perf_counter(), 0, 0, 0
    for model_type in model_types:
        if model_type in UNAVAILABLE:
            print(f"{model_type:26s} UNAVAILABLE {UNAVAILABLE[model_type]}", flush=True)
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # Reformer prints while it generates
                report = check(model_type)
        except Exception as error:  # one broken type must not hide the others
            unexpected += 1
            print(f"{model_type:26s} FAILED {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        built += 1
        clean += not report.problems
        unexpected += bool(report.problems) != (model_type in QUIRKS)
        print(report.line(), flush=True)
    seconds = time.perf_counter() - start
    print(f"{len(model_types)} types: {built} run, {clean} without a finding, {unexpected} unexpected; {seconds:.0f} s")
    return int(unexpected > 0)
