"""The folder of a recovered model: the student's own, with other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePath
from typing import Any

from transformers import PreTrainedModel

from collegium import models
from collegium._version import __version__
from collegium.compress.rewrite_config import EDIT, copy_rest, write_json
from collegium.errors import CheckpointError
from collegium.files import atomic_dir
from collegium.models.checkpoint import Checkpoint, open_checkpoint
from collegium.sites import sites

__all__ = ["write_result"]

_CARD, _CONFIG = "README.md", "config.json"


def write_result(model: PreTrainedModel, student: Checkpoint, out: Path, recovery: dict[str, Any]) -> None:
    """Write `model` to `out` as what it is: a model with the student's config, tokenizer and other files.

    ``collegium_edit.json`` gets the record of the recovery, with what the student's said in its "previous"; the model
    card gets a section. The result is loaded once before it takes its place.

    Args:
        model: in the dtypes it is to be stored in.
        recovery: what was done, as plain JSON data.

    Raises:
        CheckpointError: what was written does not load as the student does.
        StorageError: it could not be written; then there is none.
    """
    maps = {str(site.layer): list(range(site.num_experts)) for site in sites(model)}
    with atomic_dir(out) as partial:
        models.save(model, partial)
        copy_rest(student.folder, partial, {})
        # the student's own, as transformers would leave out what it does not know
        shutil.copyfile(student.folder / _CONFIG, partial / _CONFIG)
        record: dict[str, Any] = {
            "schema_version": 1,
            "kind": "recover",
            "collegium": __version__,
            "fingerprint": open_checkpoint(partial).fingerprint,
            "source": {"model": student.folder.name, "fingerprint": student.fingerprint},
            "maps": maps,
            "recovery": recovery,
        }
        if (student.folder / EDIT).exists():
            record["previous"] = _read_json(student.folder / EDIT)
        write_json(partial / EDIT, record)
        _write_card(student.folder, partial, recovery)
        models.load(partial)


def _write_card(folder: Path, out: Path, recovery: dict[str, Any]) -> None:
    before, after = recovery["before"], recovery["after"]
    first, last = recovery["kd_shares"]
    losses = "the text alone" if first == last == 0 else f"the text and its predictions (share {first:g} to {last:g})"
    teacher = PurePath(recovery["teacher"]).name if recovery["teacher"] else "no teacher"
    section = (
        "## Trained afterwards\n\n"
        f"`{folder.name}` was trained on {recovery['tokens']:,} tokens of {recovery['data']} to be like `{teacher}`: "
        f"{'its routers only' if recovery['only'] == 'router' else 'all of its weights'}, from {losses}. On held-out "
        f"text it went from {before['loss']:.4f} to {after['loss']:.4f} nats per token. `{EDIT}` holds the settings.\n"
        f"\nMade with Collegium {__version__}.\n"
    )
    card = (folder / _CARD).read_bytes().rstrip() if (folder / _CARD).exists() else f"# {folder.name}".encode()
    (out / _CARD).write_bytes(card + b"\n\n" + section.encode("utf-8"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
