"""An optimizer whose state is keyed by parameter name.

Names instead of positions let an edit of the model carry moments along with the parameters they belong to, and let a
checkpoint be read into a run with other groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from loopwise.loop.config import Component, suggest
from loopwise.train.optim.roles import Multipliers, role_of, rule_for
from loopwise.train.optim.state import copy_state

Rules = Mapping[str, Multipliers]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A torch optimizer over some of the parameters.

    Attributes:
        optimizer: its groups have, besides what torch reads, `names`, `label` and `base_lr` (see `make_groups`).
        start: the state of a parameter before the first step, as the optimizer itself would make it. It is made early
            so that a checkpoint can be read into it in place.
    """

    optimizer: torch.optim.Optimizer
    start: Callable[[nn.Parameter], dict[str, torch.Tensor]]


class NamedOptimizer:
    """One or several torch optimizers behind names.

    Args:
        parts: optimizers that share no parameter.
    """

    def __init__(self, parts: Sequence[Part]):
        self._parts = tuple(parts)
        self.parameters: dict[str, nn.Parameter] = {}
        self._of: dict[str, torch.optim.Optimizer] = {}
        labels: list[str] = []
        for part in self._parts:
            for group in part.optimizer.param_groups:
                labels.append(group["label"])
                if (count := labels.count(group["label"])) > 1:
                    group["label"] += f"_{count}"
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    assert name not in self.parameters, f"{name} is optimized twice"
                    self.parameters[name], self._of[name] = parameter, part.optimizer
                    part.optimizer.state[parameter] = part.start(parameter)
        assert len({id(parameter) for parameter in self.parameters.values()}) == len(self.parameters)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of all parts: `label`, `names`, `params`, `base_lr`, `lr` (that of the last step), and more."""
        return [group for part in self._parts for group in part.optimizer.param_groups]

    @property
    def lrs(self) -> dict[str, float]:
        """The learning rate of the last step by the label of the group; before the first step, the base."""
        return {group["label"]: group["lr"] for group in self.groups}

    def step(self, lr_factor: float = 1.0) -> None:
        """One update from the gradients; a parameter without a gradient, and its state, stay as they are.

        Args:
            lr_factor: on the learning rate of every group, at least 0.
        """
        for group in self.groups:
            group["lr"] = group["base_lr"] * lr_factor
        for part in self._parts:
            part.optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self._parts:
            part.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state as "<parameter name>/<moment>"; the tensors themselves, no copies.

        Counts of steps are float32 scalars; moments have shape, dtype and sharding of their parameter. The keys are the
        same before the first step and after it.
        """
        return {
            f"{name}/{moment}": tensor
            for name, parameter in self.parameters.items()
            for moment, tensor in self._of[name].state[parameter].items()
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a state that `state` gave, of this or of another optimizer, into this one, bit for bit.

        Raises:
            ValueError: a missing or unknown key, or another shape or dtype; nothing was copied then.
        """
        copy_state(self.state(), state, "optimizer")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Component):
    """Base of the optimizers.

    Attributes:
        lr: learning rate where the schedule's factor is 1, at least 0.
        weight_decay: decoupled (1711.05101): a step multiplies parameters by `1 - lr * weight_decay`.
        decay: which parameters decay: "matrices" are matrices and heads, not embeddings, norms, biases and other
            vectors (see `roles`); "all".
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"

    kind: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for name in ("lr", "weight_decay"):
            self.require(getattr(self, name) >= 0, name, "must be at least 0")

    def build(self, named_parameters: Mapping[str, nn.Parameter], rules: Rules | None = None) -> NamedOptimizer:
        """The optimizer of some parameters.

        Args:
            named_parameters: parameters by name, as `roles.trainable` gives them. Those without requires_grad are left
                out, and a parameter under two names is optimized once, under the first.
            rules: multipliers by name, as a parametrisation gives them; names without an entry have none.

        Raises:
            ValueError: no parameter to train, a rule for an unknown name, or one that this optimizer cannot follow.
        """
        seen: set[int] = set()
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in named_parameters.items():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[name] = parameter
        if not parameters:
            raise ValueError(f"{self.kind}: no parameter requires a gradient; pass some that do")
        for name in rules or {}:
            if name not in named_parameters:
                raise ValueError(f"{self.kind}: a rule names {name!r}, no parameter{suggest(name, named_parameters)}")
        built = NamedOptimizer(self.parts(parameters, rules or {}))
        assert built.parameters.keys() == parameters.keys(), "every parameter is optimized exactly once"
        return built

    def parts(self, parameters: Mapping[str, nn.Parameter], rules: Rules) -> list[Part]:
        """The torch optimizers that `build` joins; every parameter is in exactly one."""
        raise NotImplementedError

    def make_groups(
        self, parameters: Mapping[str, nn.Parameter], rules: Rules, *, eps: float | None = None
    ) -> list[dict[str, Any]]:
        """Groups of parameters for a torch optimizer, one per role and multipliers.

        Each has `params`, `names`, `label` (the role; an optimizer numbers those after the first), `lr`, `base_lr` and
        `weight_decay`, and `eps` where one is given.
        """
        members: dict[tuple[str, Multipliers], list[str]] = {}
        for name, parameter in parameters.items():
            members.setdefault((role_of(name, parameter.shape), rule_for(name, rules)), []).append(name)
        groups = []
        for (role, rule), names in members.items():
            decays = self.decay == "all" or role in ("matrix", "head")
            group = {
                "params": [parameters[name] for name in names],
                "names": tuple(names),
                "label": role,
                "lr": self.lr * rule.lr,
                "base_lr": self.lr * rule.lr,
                "weight_decay": self.weight_decay * rule.weight_decay if decays else 0.0,
            }
            groups.append(group | ({} if eps is None else {"eps": eps * rule.eps}))
        return groups


def adam_start(parameter: nn.Parameter, *, fused: bool = False) -> dict[str, torch.Tensor]:
    """The state of Adam before the first step: `step`, `exp_avg` and `exp_avg_sq`.

    The count is on the CPU, where reading it does not wait for an accelerator, except for fused kernels.
    """
    device = parameter.device if fused else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
