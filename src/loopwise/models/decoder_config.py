"""Our own decoder as data."""

from __future__ import annotations

from transformers import PreTrainedConfig

from loopwise.models.blocks import BlockConfig

SHARED_NORM = "norm"
LOOP_FIELDS = ("state", "update", "entry", "turn", "exit", "exit_projection", "gate", "stream", "reads", "grad")
LOOP_FIELDS += ("signal", "conditioner", "halting", "on_exit", "route", "follows", "iterations")


class LoopwiseDecoderConfig(PreTrainedConfig):
    """A decoder as data.

    Attributes:
        vocab_size: V; 0 for a model that is called with inputs_embeds only.
        hidden_size: D.
        num_hidden_layers: number of physical layers.
        blocks: a `BlockConfig` dictionary per layer, or one for all.
        plan: plan text.
        loops: per named loop a dictionary with any of `state`, `update`, `signal`, `conditioner` (loop
            components), `entry`, `turn`, `exit` (a norm's dictionary, or "norm" for the final norm itself),
            `exit_projection` (a linear map in the place of `exit`: true, or "bias" for one with a bias), `gate`
            (true, or the first value of its bias: an exit gate reads the state after every iteration), `halting` (a
            rule that the gate drives), `on_exit` ("skip" or "select", see `loopwise.loop.exits`), `stream` (name),
            `reads` (names of streams) and `grad` (how many last iterations carry a gradient, see `GradientWindow`). Or
            else `route` (routers that choose the tokens of every iteration, see `loopwise.loop.routing`) with
            `iterations` (how many there are routers for; as many as in the plan), or `follows` (name of the loop whose
            routers it goes on with) alone.
        streams: first values of named streams: "input" (the embeddings), "learned" (a vector `[D]`, a parameter) or
            "fixed" (the same as a buffer: it is not trained).
        norm: the final norm; None has none.
        norm_last: whether the final norm is applied before the head (Ouro applies it inside the loop only).
        embedding_scale: factor on the embeddings.
        embedding_dropout: probability on the embeddings in training.
        num_positions: size of a learned position table, or None.
        relaxation: offsets per visit of layers, a `RelaxationConfig` dictionary; None has none.
        value_embeddings: layer number (as text) -> width of its table of value embeddings; None has none.
        max_position_embeddings: longest context, for information.
        cache: cache policy, see `loopwise.attach`.
    """

    model_type = "loopwise_decoder"

    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    blocks: list | None = None
    plan: str = ""
    loops: dict | None = None
    streams: dict | None = None
    norm: dict | None = None
    norm_last: bool = True
    embedding_scale: float = 1.0
    embedding_dropout: float = 0.0
    num_positions: int | None = None
    relaxation: dict | None = None
    value_embeddings: dict | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    cache: str = "own"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def block_configs(self) -> list[BlockConfig]:
        """One config per physical layer.

        Raises:
            ValueError: another number of blocks than of layers.
        """
        blocks = [BlockConfig.from_dict(dict(block)) for block in self.blocks or ()]
        if len(blocks) == 1:
            blocks *= self.num_hidden_layers
        if not blocks or len(blocks) != self.num_hidden_layers:
            raise ValueError(
                f"blocks has {len(blocks)} entries, num_hidden_layers is {self.num_hidden_layers}: give one per layer"
            )
        return blocks
