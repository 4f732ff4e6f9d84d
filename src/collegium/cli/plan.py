"""``collegium plan``: decide which experts of a model are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from collegium.compress.plan import Plan, PlanDiff
    from collegium.compress.target import Target
    from collegium.measure.statistics import Statistics

__all__ = ["run"]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def run(
    statistics: Annotated[Path | None, typer.Argument(help="Folder of statistics, from a calibration pass.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model, or demo; else the one the statistics name.")
    ] = None,
    keep: Annotated[float | None, typer.Option("--keep", help="Share of the experts to keep; 0.5 if unsaid.")] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", help="Keep what fits: size of the weights, for example 14GB or 12GiB.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option("--parameters", help="Keep what fits: share of the model's parameters.")
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="The importance score.")] = "reap",
    planner: Annotated[
        str, typer.Option("--planner", help="uniform (as many in every layer) or global_floor.")
    ] = "uniform",
    floor: Annotated[int | None, typer.Option("--floor", help="Fewest experts a layer keeps (global_floor).")] = None,
    domain: Annotated[
        list[str] | None, typer.Option("--domain", help="Plan for this domain of the statistics; repeatable.")
    ] = None,
    combine: Annotated[str, typer.Option("--combine", help="How domains go together: sum, max, any, pooled.")] = "sum",
    pin: Annotated[
        list[str] | None, typer.Option("--pin", help="Keep these experts: LAYER:EXPERT[,EXPERT...]; repeatable.")
    ] = None,
    protect: Annotated[
        bool, typer.Option("--protect/--no-protect", help="Keep the super experts whatever their score.")
    ] = True,
    mtp: Annotated[str, typer.Option("--mtp", help="Multi-token-prediction layers: refuse, keep or drop.")] = "refuse",
    seed: Annotated[int | None, typer.Option("--seed", help="Of the score random.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan here; else it is only shown.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    show: Annotated[Path | None, typer.Option("--show", help="Show this plan, and do nothing else.")] = None,
    differ: Annotated[
        tuple[Path, Path] | None, typer.Option("--diff", help="Show where two plans differ, and do nothing else.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decide which experts of a model are kept, from its statistics. Nothing is changed; a plan is a file to look at.

    collegium plan STATS --keep 0.5 --method reap --out plan.json
    """
    from collegium.compress.plan import Plan, diff
    from collegium.errors import ConfigError

    if differ is not None:
        _show_diff(diff(*(Plan.load(path) for path in differ)), as_json)
        return
    if show is not None:
        _show(Plan.load(show), as_json)
        return
    if statistics is None:
        raise ConfigError("name a folder of statistics; or look at plans with --show PLAN or --diff PLAN PLAN")
    if out is not None and out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; replace it with --overwrite, or choose another")
    from collegium.compress.planners import make_plan
    from collegium.measure.statistics import Statistics

    found = Statistics.load(statistics)
    plan = make_plan(
        found,
        _target(found, model),
        _planner(planner, keep, size, parameters, floor),
        importance=method,
        settings={} if seed is None else {"seed": seed},
        domains=domain or (),
        combine=_one_of("--combine", combine, "sum", "max", "any", "pooled"),
        pins=_pins(pin or []),
        protect_super_experts=protect,
        mtp=_one_of("--mtp", mtp, "refuse", "keep", "drop"),
    )
    if out is not None:
        plan.save(out)
    _show(plan, as_json)
    if out is not None and not as_json:
        typer.echo(f"written to {out}")


def _target(statistics: Statistics, model: Path | None) -> Target:
    from collegium.assets import SHIPPED, model_folder
    from collegium.compress.target import Target
    from collegium.errors import ConfigError
    from collegium.models.checkpoint import open_checkpoint

    named = statistics.meta.model
    if model is None and named not in SHIPPED and not (Path(named) / "config.json").is_file():
        raise ConfigError(f"the statistics are of {named!r}, which is no folder here; name the model with --model")
    return Target.of(open_checkpoint(model_folder(model or named)))


def _planner(planner: str, keep: float | None, size: str | None, parameters: float | None, floor: int | None) -> Any:
    from collegium.compress.planners import Budget, GlobalFloor, Uniform
    from collegium.errors import ConfigError

    if sum(value is not None for value in (keep, size, parameters)) > 1:
        raise ConfigError("--keep, --bytes and --parameters exclude each other")
    _one_of("--planner", planner, "uniform", "global_floor")
    share = 0.5 if keep is None else keep
    if planner == "global_floor":
        if size is not None or parameters is not None:
            raise ConfigError("the planner global_floor takes a share of the experts, --keep")
        return GlobalFloor(share, floor)
    if floor is not None:
        raise ConfigError("--floor is a setting of the planner global_floor")
    if size is not None or parameters is not None:
        return Budget(None if size is None else _size(size), parameters)
    return Uniform(share)


def _one_of(option: str, value: str, *allowed: str) -> Any:
    from collegium.errors import ConfigError

    if value not in allowed:
        raise ConfigError(f"{option} {value!r} is none of {', '.join(allowed)}")
    return value


def _size(text: str) -> int:
    from collegium.errors import ConfigError

    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", text.strip().lower())
    if match is None:
        raise ConfigError(f"{text!r} is no size; write for example 14GB, 12.5GiB, or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def _pins(texts: list[str]) -> dict[int, set[int]]:
    from collegium.errors import ConfigError

    pins: dict[int, set[int]] = {}
    for text in texts:
        if not re.fullmatch(r"\d+:\d+(,\d+)*", text):
            raise ConfigError(f"--pin {text!r} must be LAYER:EXPERT[,EXPERT...], for example 3:17,20")
        layer, _, experts = text.partition(":")
        pins.setdefault(int(layer), set()).update(map(int, experts.split(",")))
    return pins


def _show(plan: Plan, as_json: bool) -> None:
    from rich.console import Console

    reached = plan.reached
    if as_json:
        record = plan.model_dump(mode="json")
        record |= {"uniform": plan.uniform, "reached": reached.model_dump()}
        for layer, one in zip(record["layers"], plan.layers, strict=True):
            layer["expected"] = one.expected
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    settings = ", ".join(f"{name} {value}" for name, value in plan.settings.items() if value is not None)
    share = _share(reached.parameters, reached.of_parameters)
    lines = [
        f"{plan.model} ({plan.family}), fingerprint {plan.fingerprint or 'none'}",
        f"score {plan.method} ({settings}), planner {plan.planner}, budget {plan.asked.what} {plan.asked.value:g}",
        f"from {'; '.join(plan.data)}; domains {', '.join(plan.domains)}",
        f"keeps {reached.experts:,} of {reached.of_experts:,} experts, {share}"
        f" of the parameters, {reached.nbytes / 1e9:.3g} of {reached.of_nbytes / 1e9:.3g} GB",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _table(plan: Plan) -> Table:
    from rich.table import Table

    table = Table("layer", "experts", "kept", "importance kept", "protected", "kept experts")
    for column in table.columns:
        column.overflow = "fold"
    for one in plan.layers:
        expected = "-" if one.expected is None else f"{one.expected:.1%}"
        ids = _ranges(one.protected), _ranges(one.keep)
        table.add_row(str(one.layer), str(one.num_experts), str(len(one.keep)), expected, *ids)
    return table


def _ranges(ids: tuple[int, ...]) -> str:
    """``0-3, 7``."""
    runs: list[list[int]] = []
    for one in ids:
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "-"


def _show_diff(found: PlanDiff, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for name, (one, other) in found.fields.items():
        console.print(f"{name}: {one} -> {other}", highlight=False, markup=False)
    table = Table("layer", "both keep", "only the first", "only the second", "overlap")
    for layer in found.layers:
        ids = _ranges(layer.only_a), _ranges(layer.only_b)
        table.add_row(str(layer.layer), str(layer.both), *ids, f"{layer.overlap:.1%}")
    if found.layers:
        console.print(table)
    console.print(f"kept experts overlap by {found.overlap:.1%} (mean of all layers)", highlight=False)
