"""In-context regression: read (x_1, y_1, ..., x_n, y_n) as a prompt and predict every y_i from what comes before it.

    e = read_in([x_1, (y_1, 0, ...), x_2, ...]);  s <- layers(update(s, e)), r times;  y_i = read_out(s at x_i)

The setting of Garg et al. (2208.01066), looped by Yang et al. (2311.12424), whose model predicts after every iteration.

Shapes: B batch, N points, I numbers per x, O numbers per prediction, D width, R iterations.
"""

from __future__ import annotations

import torch
from torch import nn

from loopwise.loop.counts import Loops, counted
from loopwise.loop.depth import LoopCount, LoopCounts
from loopwise.loop.state import RowSeeds
from loopwise.models.decoder import LoopwiseModel, LoopwisePreTrainedModel
from loopwise.models.decoder_config import LoopwiseDecoderConfig


class LoopwiseRegressionConfig(LoopwiseDecoderConfig):
    """A decoder without a vocabulary, that has a loop named core, and what it reads and predicts.

    Attributes:
        num_inputs: I.
        num_outputs: O; with 1 the predictions have no last axis.
    """

    model_type = "loopwise_regression"

    num_inputs: int = 0
    num_outputs: int = 1


class LoopwiseForRegression(LoopwisePreTrainedModel):
    """The decoder between a linear read-in of points and a linear read-out of predictions."""

    config_class = LoopwiseRegressionConfig

    def __init__(self, config: LoopwiseRegressionConfig):
        super().__init__(config)
        for field in ("num_inputs", "num_outputs"):
            if getattr(config, field) < 1:
                raise ValueError(f"{field} is {getattr(config, field)}: use a whole number of at least 1")
        self.read_in = nn.Linear(config.num_inputs, config.hidden_size)
        self.model = LoopwiseModel(config)
        if "core" not in self.model.loopwise.plan.loops:
            raise ValueError(f"the plan {config.plan} has no loop named core, after which predictions could be read")
        self.read_out = nn.Linear(config.hidden_size, config.num_outputs)
        self.post_init()

    def forward(
        self,
        xs_BNI: torch.Tensor,
        ys_BN: torch.Tensor,
        loops: Loops = None,
        loop_start: int = 0,
        generator: torch.Generator | RowSeeds | None = None,
    ) -> torch.Tensor:
        """Predictions after every iteration from `loop_start` on.

        The loss of the method is the mean squared error of all of them against `ys_BN`. Iterations before `loop_start`
        run without a gradient, so that the window of the method is `loops=b, loop_start=b - window`.

        Args:
            xs_BNI: points, floating `[B, N, I]`.
            ys_BN: values at the points, `[B, N]`; the one at a point is not seen by its prediction.
            loops: iteration counts of this call; those without a gradient of a `LoopCount` are `loop_start` itself.
            loop_start: number of first iterations that are not read out.
            generator: source of a random first state.

        Returns:
            `[R - loop_start, B, N]`, or `[R - loop_start, B, N, O]` where O > 1.

        Raises:
            ValueError: misshapen points or values, more points than positions, or a loop_start that leaves nothing.
        """
        if isinstance(loops, (LoopCount, LoopCounts)):
            loop_start = (loops if isinstance(loops, LoopCount) else loops.batch).no_grad
        num_loops = counted(self.model.loopwise.plan, loops, None)[0].counts["core"]
        if not 0 <= loop_start < num_loops:
            raise ValueError(
                f"loop_start is {loop_start}, the loop runs {num_loops} iterations: use 0 to {num_loops - 1}"
            )
        window = None if isinstance(loops, (LoopCount, LoopCounts)) else {"core": num_loops - loop_start}
        options = {"collect": "core", "generator": generator}
        prompt = self.read_in(self.prompt(xs_BNI, ys_BN))
        self.model(inputs_embeds=prompt, loops=loops, window=window, loop_options=options)
        assert self.model.passes is not None
        states_RBTD = torch.stack(self.model.passes.states[loop_start:])
        self.model.passes = None
        predictions = self.read_out(states_RBTD[:, :, ::2])
        return predictions[..., 0] if self.config.num_outputs == 1 else predictions

    def prompt(self, xs_BNI: torch.Tensor, ys_BN: torch.Tensor) -> torch.Tensor:
        """Points and values in turn, a value as the first of I numbers: `[B, 2 N, I]`.

        Raises:
            ValueError: shapes that do not fit the model or each other.
        """
        if xs_BNI.ndim != 3 or xs_BNI.shape[-1] != self.config.num_inputs:
            raise ValueError(f"xs has shape {list(xs_BNI.shape)}: use [batch, points, {self.config.num_inputs}]")
        if ys_BN.shape != xs_BNI.shape[:2]:
            raise ValueError(f"ys has shape {list(ys_BN.shape)}, xs asks for {list(xs_BNI.shape[:2])}")
        values_BNI = nn.functional.pad(ys_BN[..., None].to(xs_BNI), (0, xs_BNI.shape[-1] - 1))
        return torch.stack([xs_BNI, values_BNI], dim=2).flatten(1, 2)
