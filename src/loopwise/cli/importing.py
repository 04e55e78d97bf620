"""`loopwise import`: a checkpoint of a known family as a folder of our own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import FlagCreatePairsOff, Positional

import loopwise
from loopwise.cli import common

# What belongs to a tokenizer, in all the forms that tokenizers have.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*.model")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Arguments of `loopwise import`."""

    source: Positional[Path]
    """folder of the checkpoint; `loopwise families` lists what is known"""
    dst: Positional[Path]
    """folder to write; must not exist yet, or be empty"""
    allow_untied: FlagCreatePairsOff[bool] = False
    """load a checkpoint whose recursions should share tensors and do not, as separate layers"""

    def run(self) -> None:
        """Load, write, and print what was written."""
        common.quiet_libraries()
        from loopwise.checkpoints.loading import import_checkpoint

        common.check_destination(self.dst)
        with common.notes():
            model = import_checkpoint(self.source, allow_untied=self.allow_untied)
        with common.whole_folder(self.dst) as folder:
            model.save_pretrained(folder)
            for pattern in TOKENIZER_FILES:
                for path in self.source.glob(pattern):
                    shutil.copyfile(path, folder / path.name)
        family, plan = model.config.foreign["family"], loopwise.plan_of(model)
        print(f"wrote {self.dst} ({family}, plan {plan}, {common.size_of(self.dst)})")
