"""`loopwise_edit.json`: what an edited folder was made of, and how."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import loopwise
from loopwise.edit.maps import DepthEdit
from loopwise.io.tensors import Checkpoint, read_json

FILE = "loopwise_edit.json"


def source_of(folder: Path, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What identifies a source: its folder's name, hashes of config.json and of its files' headers, their sizes."""
    config = folder / "config.json"
    found: dict[str, Any] = {"name": folder.name}
    if config.is_file():
        found["config_sha256"] = hashlib.sha256(config.read_bytes()).hexdigest()
    if checkpoint is not None:
        found["files"] = {
            name: {"bytes": file.stamp[0], "header_sha256": file.digest} for name, file in checkpoint.files.items()
        }
    return found


def provenance(
    source: Mapping[str, Any],
    operators: Sequence[str],
    edit: DepthEdit | None,
    *,
    path: str,
    mode: str,
    earlier: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The JSON object.

    Args:
        source: see `source_of`.
        operators: texts of the operators.
        edit: the edit as it was carried out; None where only the in-memory model knows it.
        path: "streamed" or "in memory".
        mode: "tie" or "materialize".
        earlier: the same object of the source, where that is an edited folder itself.
    """
    record: dict[str, Any] = {
        "format": 1,
        "source": dict(source),
        "operators": list(operators),
        "mode": mode,
        "path": path,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"loopwise": loopwise.__version__, "python": platform.python_version()},
    }
    if edit is not None:
        record |= {
            "plan_before": str(edit.before),
            "plan": str(edit.plan),
            "layers_before": edit.num_layers,
            "layers": [_layer(layer) for layer in edit.layers],
            "promise": edit.promise,
        }
    if earlier is not None:
        record["earlier"] = dict(earlier)
    return record


def earlier_of(folder: Path) -> dict[str, Any] | None:
    """The provenance that a source carries, None when it is no edited folder."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else None


def text_of(record: Mapping[str, Any]) -> str:
    """As it stands in the file: short lists on one line each."""
    rows = [json.dumps(row, ensure_ascii=False) for row in record.get("layers", ())]
    whole = json.dumps({**record, "layers": "@"} if rows else record, indent=2, ensure_ascii=False)
    if rows:
        whole = whole.replace('"layers": "@"', '"layers": [\n    ' + ",\n    ".join(rows) + "\n  ]", 1)
    return whole + "\n"


def _layer(layer: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"sources": list(layer.sources)}
    if layer.zero:
        made["zero"] = True
    if layer.scale:
        made["scale"] = [list(rule) for rule in layer.scale]
    return made
