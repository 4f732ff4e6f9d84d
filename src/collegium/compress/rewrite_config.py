"""What a pruned checkpoint holds beside its weights: config, model card, record of the edit, and copies of the rest."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from collegium import __version__
from collegium.compress.plan import Plan
from collegium.compress.rewrite_layout import renumber
from collegium.errors import CheckpointError
from collegium.models.families import KEYS, SECTIONS
from collegium.models.shards import copy_others
from collegium.models.summary import layer_of

__all__ = ["CARD", "EDIT", "copy_rest", "edit_config", "write_card", "write_edit", "write_json"]

EDIT = "collegium_edit.json"
"""File that says how a checkpoint was made from another one."""

CARD, CONFIG = "README.md", "config.json"
_QUANTISER_FILES = ("quantize_config.json", "hf_quant_config.json")
_MTP_COUNTS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "num_mtp_modules",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
)
_GONE = object()

Keep = Mapping[int, tuple[int, ...]]
"""Layer -> ids of the experts that stay, ascending."""


def edit_config(
    config: dict[str, Any],
    folder: Path,
    num_experts: int,
    keep: Keep,
    *,
    drop_mtp: bool,
    width: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """A config with the new number of experts wherever the family writes it; `config`, that of `folder`, is unchanged.

    Args:
        width: f before and after, if it changes.

    Names of experts in a quantiser's settings follow their tensors.

    Raises:
        CheckpointError: the config has no such key, or one that says another number than `num_experts`.
    """
    path = folder / CONFIG
    config = copy.deepcopy(config)
    kept = len(next(iter(keep.values())))
    found = False
    for table in _tables(config):
        for key in KEYS["num_experts"]:
            value = table.get(key)
            if value is None:
                continue
            if value != num_experts:
                raise CheckpointError(
                    f"{path}: {key} is {value!r}, and the weights hold {num_experts} experts a layer; only models "
                    "with one number of experts for all layers can be rewritten"
                )
            table[key] = kept
            found = True
        if drop_mtp:
            table.update({key: 0 for key in _MTP_COUNTS if table.get(key)})
    if not found:
        raise CheckpointError(
            f"{path} does not say how many experts a layer has, so the smaller number cannot be written; add the "
            f"family's key ({', '.join(KEYS['num_experts'])}), {num_experts}"
        )
    if width is not None:
        _narrow(config, path, *width)
    if "quantization_config" in config:
        config["quantization_config"] = _follow(config["quantization_config"], keep)
    return config


def _narrow(config: dict[str, Any], path: Path, before: int, after: int) -> None:
    """Write the new width of an expert where the config has the old one."""
    for key in KEYS["expert_width"]:
        tables = [table for table in _tables(config) if table.get(key) == before]
        for table in tables:
            table[key] = after
        if tables:
            return
    raise CheckpointError(
        f"{path} does not say that experts are {before} wide, so the smaller width cannot be written; add the family's "
        f"key ({', '.join(KEYS['expert_width'])}), {before}"
    )


def copy_rest(folder: Path, out: Path, keep: Keep) -> None:
    """Copy tokenizer, generation config, chat templates, code and what else is no weights and not written by us."""
    copy_others(folder, out, (CONFIG, CARD, EDIT, *_QUANTISER_FILES))
    for name in _QUANTISER_FILES:
        if (folder / name).is_file():
            write_json(out / name, _follow(_read_json(folder / name), keep))


def write_edit(out: Path, folder: Path, plan: Plan, keep: Keep, source: str, result: str) -> None:
    """Write `EDIT`: the plan, which expert of the source each one was, and the edits the source had seen itself.

    Args:
        source, result: fingerprints of the two checkpoints.
    """
    record: dict[str, Any] = {
        "schema_version": 1,
        "kind": plan.kind,
        "collegium": __version__,
        "fingerprint": result,
        "source": {"model": PurePath(plan.model).name, "fingerprint": source},
        "maps": {str(layer): list(ids) for layer, ids in keep.items()},
        "plan": plan.model_dump(mode="json"),
    }
    if (folder / EDIT).exists():
        record["previous"] = _read_json(folder / EDIT)
    write_json(out / EDIT, record)


def write_card(out: Path, folder: Path, plan: Plan, keep: Keep, parameters: tuple[int, int]) -> None:
    """Write the model card: the source's, if it has one, and a section on what was done.

    Args:
        parameters: of the source and of the result.
    """
    before, after = parameters
    data = f" on {', '.join(plan.data)}" if plan.data else ""
    section = (
        f"{_what(plan, len(keep))} {_how(plan)} They were chosen by `{plan.method}`{data}, with the planner "
        f"`{plan.planner}`. {after:,} of {before:,} parameters are left, and nothing was trained afterwards. `{EDIT}` "
        f"holds the plan and the original number of every expert.\n\nMade with Collegium {__version__}.\n"
    )
    card = (folder / CARD).read_bytes().rstrip() if (folder / CARD).exists() else f"# {_title(plan)}".encode()
    (out / CARD).write_bytes(card + b"\n\n" + section.encode("utf-8"))


def _what(plan: Plan, layers: int) -> str:
    """Headline, and what became of the experts."""
    first, source = plan.layers[0], f"`{PurePath(plan.model).name}`"
    share = [layer.expected for layer in plan.layers if layer.expected is not None]
    kept = f", {sum(share) / len(share):.1%} of their importance by that score" if share else ""
    if any(one.op == "merge" for one in plan.layers):
        head = "## Experts merged"
    else:
        head = "## Experts made slimmer" if plan.layers[0].op == "slim" else "## Experts removed"
    text = (
        f"Each of the {layers} MoE layers keeps {len(first.keep)} of the {first.num_experts} experts of {source}{kept}"
    )
    width = f", with {len(first.neurons[0])} of {first.intermediate_size} neurons each" if first.neurons else ""
    return f"{head}\n\n{text}{width}."


def _how(plan: Plan) -> str:
    """What happened to weights."""
    if plan.operator is not None:
        rows = f" Router rows follow by `{plan.router.mode}`."
        return f"Experts that share a group were merged by `{plan.operator.name}`.{rows}"
    return "No weight was changed."


def _title(plan: Plan) -> str:
    """What a model without a card of its own is called."""
    return f"{PurePath(plan.model).name}, {len(plan.layers[0].keep)} of {plan.layers[0].num_experts} experts"


def write_json(path: Path, value: Any) -> None:
    """As transformers formats its own files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tables(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections of a raw config that may describe the language model."""
    tables = []
    for section in SECTIONS:
        table: Any = config
        for step in section.split(".") if section else ():
            table = table.get(step) if isinstance(table, dict) else None
        if isinstance(table, dict):
            tables.append(table)
    return tables


def _follow(value: Any, keep: Keep) -> Any:
    """`value` with every expert that a text or key in it names renumbered, and without those that go."""
    if isinstance(value, str):
        block = layer_of(value)
        new = renumber(value, keep[block[1]]) if block is not None and block[1] in keep else value
        return _GONE if new is None else new
    if isinstance(value, list):
        return [new for item in value if (new := _follow(item, keep)) is not _GONE]
    if isinstance(value, dict):
        pairs = ((_follow(key, keep), _follow(item, keep)) for key, item in value.items())
        return {key: item for key, item in pairs if key is not _GONE and item is not _GONE}
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
