"""Muon (Jordan et al. 2024; for language models 2502.16982), torch's own, with AdamW for what is no hidden matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from loopwise.train.optim.adamw import AdamWConfig
from loopwise.train.optim.named import OptimizerConfig, Part, Rules
from loopwise.train.optim.roles import role_of, rule_for


@dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Momentum whose update is made orthogonal, for hidden matrices; AdamW for embeddings, heads, vectors and stacks.

        m <- mu m + (1 - mu) g;  u = mu m + (1 - mu) g with Nesterov, else m
        p <- p (1 - lr wd) - lr s(p) orthogonal(u)

    orthogonal(u) is five iterations of Newton and Schulz in bfloat16, about U V^T of the singular value decomposition.

    Attributes:
        lr: of the matrices, which also multiplies their weight decay.
        momentum: mu, from 0 to below 1.
        nesterov: see above.
        scale: s(p) of an `[A, B]` matrix: "match_rms_adamw" is 0.2 sqrt(max(A, B)), with which learning rates of AdamW
            fit (2502.16982); "original" is sqrt(max(1, A / B)).
        adamw: the optimizer of the other parameters. Its learning rate is its own.
    """

    kind: ClassVar[str | None] = "optimizer.muon"
    momentum: float = 0.95
    nesterov: bool = True
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    adamw: AdamWConfig = field(default_factory=AdamWConfig)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require(0 <= self.momentum < 1, "momentum", "must be at least 0 and below 1")

    def parts(self, parameters: Mapping[str, nn.Parameter], rules: Rules) -> list[Part]:
        """`torch.optim.Muon` for the hidden matrices, and AdamW where there are other parameters.

        Raises:
            ValueError: the rules change the learning rate of a hidden matrix; they were derived for Adam.
        """
        hidden, rest = {}, {}
        for name, parameter in parameters.items():
            is_matrix = parameter.ndim == 2 and role_of(name, parameter.shape) == "matrix"
            (hidden if is_matrix else rest)[name] = parameter
        for name in hidden:
            if rule_for(name, rules).lr != 1:
                raise ValueError(
                    f"{self.kind}: the parametrisation multiplies the learning rate of {name!r} by "
                    f"{rule_for(name, rules).lr:g}, which is derived for Adam; use optimizer.adamw or another one"
                )
        found = []
        if hidden:
            settings = {"momentum": self.momentum, "nesterov": self.nesterov, "adjust_lr_fn": self.scale}
            optimizer = ShardedMuon(self.make_groups(hidden, rules), **settings)
            found.append(Part(optimizer=optimizer, start=_start))
        adamw = replace(self.adamw, decay=self.decay)
        return found + (adamw.parts(rest, rules) if rest else [])


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` that also takes sharded matrices, with the same bits as on one process.

    An orthogonal update needs the whole matrix. For a sharded one the momentum stays sharded, its update and the
    parameter are gathered, every rank runs torch's step on the whole, and keeps its shard of the result.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not supported."""
        assert closure is None
        everything = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            sharded = [parameter for parameter in group["params"] if isinstance(parameter, DTensor)]
            for parameter in sharded:
                if parameter.grad is not None:
                    self._step_sharded(parameter, group)
            group["params"] = [parameter for parameter in group["params"] if not isinstance(parameter, DTensor)]
        try:
            super().step()
        finally:
            for group, parameters in zip(self.param_groups, everything, strict=True):
                group["params"] = parameters

    def _step_sharded(self, parameter: DTensor, group: dict[str, Any]) -> None:
        momentum, gradient = self.state[parameter]["momentum_buffer"], parameter.grad
        assert isinstance(gradient, DTensor)
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        whole = nn.Parameter(parameter.full_tensor())
        assert isinstance(update, DTensor)
        whole.grad = update.full_tensor()
        # With momentum 0 the update of torch's step is the gradient that it is given.
        options = {key: group[key] for key in ("lr", "weight_decay", "ns_coefficients", "eps", "ns_steps")}
        torch.optim.Muon([whole], momentum=0.0, nesterov=False, adjust_lr_fn=group["adjust_lr_fn"], **options).step()
        # Every rank has the same whole, so it is cut without communication.
        parameter.copy_(
            distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
        )


def _start(parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
