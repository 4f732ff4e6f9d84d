"""``collegium plan``: decide which experts of a model are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from collegium.compress.plan import LayerPlan, Plan, PlanDiff, RouterEdit
    from collegium.compress.target import Target
    from collegium.measure.statistics import Statistics

__all__ = ["run"]


def run(
    what: Annotated[
        list[Path],
        typer.Argument(
            metavar="STATS | show PLAN | diff PLAN PLAN",
            help="A folder of statistics, from a calibration pass; or a plan to look at, or two to compare.",
        ),
    ],
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
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="The score: reap if unsaid; of neurons, heapr.")
    ] = None,
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
    merge: Annotated[
        str | None, typer.Option("--merge", help="Make one expert of several by this merge, instead of dropping them.")
    ] = None,
    grouping: Annotated[str | None, typer.Option("--grouping", help="Which experts are merged.")] = None,
    router: Annotated[
        str, typer.Option("--router", help="How the routers follow: rows, freq_avg, lse_fit, dern, many_to_one.")
    ] = "rows",
    neurons: Annotated[
        float | None, typer.Option("--neurons", help="Keep every expert, and this share of the neurons of each.")
    ] = None,
    widths: Annotated[
        str, typer.Option("--widths", help="With --neurons: uniform (loads anywhere), per_layer or ragged.")
    ] = "uniform",
    factor: Annotated[
        str | None, typer.Option("--factor", help="Keep every expert, its matrices as products of smaller ones.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of one of these, e.g. score.seed=3 or merge.rank=0.75; repeatable."),
    ] = None,
    mtp: Annotated[str, typer.Option("--mtp", help="Multi-token-prediction layers: refuse, keep or drop.")] = "refuse",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan here; else it is only shown.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decide which experts of a model are kept, from its statistics. Nothing is changed; a plan is a file to look at.

    collegium plan STATS --keep 0.5 --method reap --out plan.json

    collegium plan show plan.json

    collegium plan diff plan.json other.json
    """
    from collegium.cli._planning import one_of, open_planner, parse_pins, parse_settings, target_of
    from collegium.compress.plan import Plan, diff
    from collegium.errors import ConfigError

    words = list(map(str, what))
    if words[0] == "show" and len(what) == 2:
        _show(Plan.load(what[1]), as_json)
        return
    if words[0] == "diff" and len(what) == 3:
        _show_diff(diff(Plan.load(what[1]), Plan.load(what[2])), as_json)
        return
    if len(what) != 1:
        raise ConfigError(f"{' '.join(words)!r} is none of STATS, show PLAN, diff PLAN PLAN")
    statistics = what[0]
    if out is not None and out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; replace it with --overwrite, or choose another")
    from collegium.compress.planners import make_plan
    from collegium.measure.statistics import Statistics

    found = Statistics.load(statistics)
    settings = parse_settings(change or [])
    target = target_of(found, model)
    shared: dict[str, Any] = {"protect_super_experts": protect, "mtp": one_of("--mtp", mtp, "refuse", "keep", "drop")}
    if neurons is not None or factor is not None:
        _refuse_with("--neurons or --factor", keep=keep, size=size, parameters=parameters, merge=merge, domain=domain)
    if factor is not None:
        plan = _factor_plan(found, model, factor, settings, shared["mtp"])
    elif neurons is not None:
        plan = _neuron_plan(found, target, neurons, method or "heapr", widths, settings, pin or [], shared)
    else:
        plan = make_plan(
            found,
            target,
            open_planner(planner, keep, size, parameters, floor),
            importance=method or "reap",
            settings=settings["score"],
            domains=domain or (),
            combine=one_of("--combine", combine, "sum", "max", "any", "pooled"),
            pins=parse_pins(pin or []),
            grouping=_grouping(grouping, settings["grouping"]),
            operator=_operator(merge, settings["merge"]),
            router=_router(router, settings["router"]),
            **shared,
        )
    if out is not None:
        plan.save(out)
    _show(plan, as_json)
    if out is not None and not as_json:
        typer.echo(f"written to {out}")


def _refuse_with(what: str, **options: Any) -> None:
    from collegium.errors import ConfigError

    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{what} keeps every expert and does not go with {', '.join(f'--{name}' for name in given)}")


def _operator(name: str | None, settings: dict[str, Any]) -> Any:
    """The merge with all of its settings, so that the plan says them."""
    from dataclasses import asdict

    from collegium.compress.merge import find_merge
    from collegium.compress.plan import Operator

    if name is None:
        return None
    found: Any = find_merge(name, settings)
    return Operator(name=name, settings=asdict(found))


def _router(mode: str, settings: dict[str, Any]) -> RouterEdit:
    from collegium.compress.plan import RouterEdit
    from collegium.compress.router_edits import router_edit_needs

    router_edit_needs(mode)  # a mode that there is not
    return RouterEdit(mode=mode, settings=settings)


def _grouping(name: str | None, settings: dict[str, Any]) -> Any:
    from collegium.compress.grouping import find_grouping

    return None if name is None else find_grouping(name, settings)


def _neuron_plan(
    statistics: Statistics,
    target: Target,
    share: float,
    score: str,
    widths: str,
    settings: dict[str, dict[str, Any]],
    pins: list[str],
    shared: dict[str, Any],
) -> Plan:
    from collegium.cli._planning import one_of, parse_pins
    from collegium.compress.neurons import plan_neurons

    mode = one_of("--widths", widths, "uniform", "per_layer", "ragged")
    return plan_neurons(
        statistics,
        target,
        score=score,
        share=share,
        mode=mode,
        settings=settings["score"],
        pins=parse_pins(pins),
        **shared,
    )


def _factor_plan(
    statistics: Statistics, model: Path | None, factor: str, settings: dict[str, dict[str, Any]], mtp: Any
) -> Plan:
    from collegium.assets import model_folder
    from collegium.compress.factor import factor_plan

    folder = model_folder(model or statistics.meta.model)
    return factor_plan(folder, factor, settings["factor"], statistics=statistics, mtp=mtp)


def _show(plan: Plan, as_json: bool) -> None:
    from rich.console import Console

    reached = plan.reached
    if as_json:
        record = plan.model_dump(mode="json")
        record |= {"uniform": plan.uniform, "portable": plan.portable, "reached": reached.model_dump()}
        for layer, one in zip(record["layers"], plan.layers, strict=True):
            layer["expected"] = one.expected
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    settings = _pairs(plan.settings)
    share = _share(reached.parameters, reached.of_parameters)
    lines = [
        f"{plan.model} ({plan.family}), fingerprint {plan.fingerprint or 'none'}",
        f"score {plan.method} ({settings}), planner {plan.planner}, budget {plan.asked.what} {plan.asked.value:g}",
        f"from {'; '.join(plan.data)}; domains {', '.join(plan.domains)}",
        f"keeps {reached.experts:,} of {reached.of_experts:,} experts, {share}"
        f" of the parameters, {reached.nbytes / 1e9:.3g} of {reached.of_nbytes / 1e9:.3g} GB",
    ]
    if plan.operator is not None:
        lines.append(f"by {plan.operator.name} ({_pairs(plan.operator.settings)}); router {plan.router.mode}")
    elif plan.router.mode != "rows":
        lines.append(f"router {plan.router.mode}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _table(plan: Plan) -> Table:
    from rich.table import Table

    slim = any(one.neurons for one in plan.layers)
    merged = any(one.groups for one in plan.layers)
    last = "groups" if merged else "neurons of each" if slim else "kept experts"
    table = Table("layer", "experts", "kept", "importance kept", "protected", last)
    for column in table.columns:
        column.overflow = "fold"
    for one in plan.layers:
        expected = "-" if one.expected is None else f"{one.expected:.1%}"
        ids = _ranges(one.protected), _what(one, merged, slim)
        table.add_row(str(one.layer), str(one.num_experts), str(len(one.keep)), expected, *ids)
    return table


def _what(layer: LayerPlan, merged: bool, slim: bool) -> str:
    """The decision in words."""
    if merged:
        return " ".join("+".join(map(str, group)) for group in layer.members)
    if slim:
        widths = sorted({len(ids) for ids in layer.neurons} or {layer.intermediate_size or 0})
        return f"{'-'.join(map(str, dict.fromkeys((widths[0], widths[-1]))))} of {layer.intermediate_size}"
    return _ranges(layer.keep)


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
    table = Table("layer", "both keep", "only the first", "only the second", "overlap", "also differ in")
    for layer in found.layers:
        ids = _ranges(layer.only_a), _ranges(layer.only_b)
        table.add_row(str(layer.layer), str(layer.both), *ids, f"{layer.overlap:.1%}", ", ".join(layer.other))
    if found.layers:
        console.print(table)
    console.print(f"kept experts overlap by {found.overlap:.1%} (mean of all layers)", highlight=False)
