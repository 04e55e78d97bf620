"""Entry point of the `loopwise` command.

Verbs are frozen dataclasses with a `run` method. Reading the command line loads neither torch nor transformers: a verb
imports them when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, PositionalMetavarFromFieldName, subcommand

import loopwise
from loopwise.cli.architectures import Architectures
from loopwise.cli.calibrate import Calibrate
from loopwise.cli.compare import Compare
from loopwise.cli.compose import Compose
from loopwise.cli.data import Data
from loopwise.cli.edit import Edit
from loopwise.cli.export import Export
from loopwise.cli.families import Families
from loopwise.cli.generate import Generate
from loopwise.cli.importing import Import
from loopwise.cli.inspect import Inspect
from loopwise.cli.propose import Propose
from loopwise.cli.score import Score
from loopwise.cli.serve import Serve
from loopwise.cli.tasks import Tasks
from loopwise.cli.tour import Tour
from loopwise.cli.train import Recipes, Train
from loopwise.cli.uptrain import Uptrain

DESCRIPTION = (
    "A decoder is layers plus a plan. Run any transformers decoder under any plan. --version prints the version."
)

Command = (
    Annotated[Tour, subcommand("tour", description="Watch a small looped model answer, iteration by iteration.")]
    | Annotated[Train, subcommand("train", description="Train a recipe, or go on with a run.")]
    | Annotated[Uptrain, subcommand("uptrain", description="Heal an edited checkpoint.")]
    | Annotated[Compare, subcommand("compare", description="Train methods under several seeds, side by side.")]
    | Annotated[Recipes, subcommand("recipes", description="List the recipes that train knows.")]
    | Annotated[Tasks, subcommand("tasks", description="List the reasoning tasks, or show rows of one.")]
    | Annotated[Data, subcommand("data", description="Build token shards from texts, or show what is in them.")]
    | Annotated[Inspect, subcommand("inspect", description="Show layers, the plan drawn, parameters and cost.")]
    | Annotated[Generate, subcommand("generate", description="Continue or answer a prompt, streaming.")]
    | Annotated[Calibrate, subcommand("calibrate", description="Find thresholds at which tokens may stop early.")]
    | Annotated[Serve, subcommand("serve", description="Answer OpenAI-compatible HTTP requests, batched over depth.")]
    | Annotated[Score, subcommand("score", description="Perplexity of a text file under several plans, side by side.")]
    | Annotated[Propose, subcommand("propose", description="Say which layers to loop, tie or prune, and why.")]
    | Annotated[Edit, subcommand("edit", description="Grow, prune, reorder or tie layers, as a new folder.")]
    | Annotated[Export, subcommand("export", description="Write a model under a plan as a folder of its own.")]
    | Annotated[Import, subcommand("import", description="Write a public looped checkpoint as a folder of our own.")]
    | Annotated[Families, subcommand("families", description="List the public looped models that load, with parity.")]
    | Annotated[Architectures, subcommand("architectures", description="List model types: what runs, what is refused.")]
    | Annotated[Compose, subcommand("compose", description="Print which capabilities run together.")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit code.

    0 is success, 2 a wrong command line or bad input (one line on standard error), 130 an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"loopwise {loopwise.__version__}")
        return 0
    try:
        command = tyro.cli(
            Command,  # pyright: ignore[reportArgumentType]
            prog="loopwise",
            description=DESCRIPTION,
            args=arguments,
            config=(OmitArgPrefixes, OmitSubcommandPrefixes, PositionalMetavarFromFieldName),
        )
        command.run()
        sys.stdout.flush()
    except SystemExit as stop:  # tyro has printed the help or what is wrong
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone: point the descriptor elsewhere, or Python complains again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        pointer = getattr(error, "pointer", "")
        if pointer and sys.stderr.isatty():
            print(pointer, file=sys.stderr)
        return 2
    return 0


def one_line(error: Exception) -> str:
    """What is wrong, without the lines of advice that libraries add."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
