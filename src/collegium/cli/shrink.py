"""``collegium shrink``: a smaller model in one command, with what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Dtype

if TYPE_CHECKING:
    from collegium.cli._shrink import Result

__all__ = ["run"]


def run(
    model: Annotated[Path, typer.Argument(help="A folder with a MoE model and its tokenizer; or demo.")],
    data: Annotated[
        str, typer.Option("--data", help="'local', a folder of texts, or a .jsonl or .parquet file; in several splits.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the smaller model; it must not exist.")],
    keep: Annotated[float | None, typer.Option("--keep", help="Share of the experts to keep; 0.5 if unsaid.")] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", help="Keep what fits: size of the weights, for example 14GB or 12GiB.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option("--parameters", help="Keep what fits: share of the model's parameters.")
    ] = None,
    planner: Annotated[
        str, typer.Option("--planner", help="uniform (as many in every layer) or global_floor, which needs --own.")
    ] = "uniform",
    floor: Annotated[int | None, typer.Option("--floor", help="Fewest experts a layer keeps (global_floor).")] = None,
    neurons: Annotated[
        float | None,
        typer.Option("--neurons", help="Keep all experts, and this share of the neurons of each."),
    ] = None,
    widths: Annotated[
        str, typer.Option("--widths", help="With --neurons: uniform, or per_layer or ragged, which need --own.")
    ] = "uniform",
    own: Annotated[
        bool, typer.Option("--own", help="Where transformers cannot hold the result, write collegium's own format.")
    ] = False,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="The score: reap if unsaid; of neurons, heapr.")
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option("--domain", help="Shrink for this domain of the data; repeatable.")
    ] = None,
    combine: Annotated[str, typer.Option("--combine", help="How domains go together: sum, max, any, pooled.")] = "sum",
    pin: Annotated[
        list[str] | None, typer.Option("--pin", help="Keep these experts: LAYER:EXPERT[,EXPERT...]; repeatable.")
    ] = None,
    protect: Annotated[
        bool, typer.Option("--protect/--no-protect", help="Keep the super experts whatever their score.")
    ] = True,
    mtp: Annotated[str, typer.Option("--mtp", help="Multi-token-prediction layers: refuse, keep or drop.")] = "refuse",
    merge: Annotated[
        str | None, typer.Option("--merge", help="Make one expert of several by this merge, instead of dropping them.")
    ] = None,
    grouping: Annotated[
        str | None, typer.Option("--grouping", help="Which experts are merged; see `collegium methods`.")
    ] = None,
    router: Annotated[str, typer.Option("--router", help="How the routers follow: rows, freq_avg, ...")] = "rows",
    recover: Annotated[
        int, typer.Option("--recover", min=0, help="Then train it on so many tokens to be like the original.")
    ] = 0,
    stages: Annotated[
        int, typer.Option("--stages", min=1, help="Do it in so many stages, sharing the tokens of --recover.")
    ] = 1,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of one of these, e.g. score.seed=3 or merge.rank=0.75; repeatable."),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Calibrate on so many tokens of the training split.")
    ] = 65_536,
    eval_tokens: Annotated[
        int, typer.Option("--eval-tokens", min=1, help="Judge on so many tokens of the test split.")
    ] = 16_384,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in a forward.")] = 4,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", min=2, help="Tokens in a sequence; 512 if unsaid, or what the model can."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder for statistics, plan, judgements, page; else OUT.work.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on where an earlier run stopped, or start again.")
    ] = True,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Make a model smaller: calibrate, plan, predict the loss, write the checkpoint, measure it, and show it all.

    collegium shrink demo --keep 0.5 --method reap --data local --out small

    The result loads in plain transformers, unless it is --own. Calibrating and writing never hold the whole model in
    memory; predicting and measuring do, and are left out, with a warning, where it does not fit. Everything else goes
    to OUT.work: a run that was stopped goes on from there with the same command.
    """
    from collegium.cli import _shrink
    from collegium.cli._model import DTYPES
    from collegium.cli._planning import one_of, open_planner, parse_pins, parse_settings
    from collegium.cli._shrink_settings import Settings
    from collegium.errors import ConfigError

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    settings = Settings(
        method=method or ("reap" if neurons is None else "heapr"),
        settings=parse_settings(change or []),
        planner=open_planner(planner, keep if neurons is None else 1.0, size, parameters, floor),
        neurons=neurons,
        widths=one_of("--widths", widths, "uniform", "per_layer", "ragged"),
        own=own,
        domains=tuple(domain or ()),
        combine=one_of("--combine", combine, "sum", "max", "any", "pooled"),
        pins={layer: tuple(sorted(experts)) for layer, experts in sorted(parse_pins(pin or []).items())},
        protect=protect,
        mtp=one_of("--mtp", mtp, "refuse", "keep", "drop"),
        merge=merge,
        grouping=grouping,
        router=router,
        recover=recover,
        stages=stages,
        tokens=tokens,
        eval_tokens=eval_tokens,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
    )
    if neurons is not None and keep is not None:
        raise ConfigError("--neurons keeps every expert; leave out --keep, --bytes and --parameters")
    folder = Path(f"{out}.work") if work is None else work
    try:
        result = _shrink.shrink(model, data, out, folder, settings, resume=resume)
    except KeyboardInterrupt:
        typer.echo(f"stopped; what is done is in {folder}, the same command goes on", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(_record(result), indent=2, ensure_ascii=False, allow_nan=False))
        return
    _say(result)


def _record(result: Result) -> dict[str, Any]:
    shrunk = result.shrunk
    return {
        "model": str(result.out),
        "page": str(result.page),
        "work": str(result.work),
        "experts": shrunk.plan.reached.experts,
        "of_experts": shrunk.plan.reached.of_experts,
        "parameters": shrunk.after.parameters,
        "of_parameters": shrunk.before.parameters,
        "nbytes": shrunk.after.nbytes,
        "of_nbytes": shrunk.before.nbytes,
        "predicted": None if shrunk.predicted is None else shrunk.predicted.record(),
        "measured": None if shrunk.measured is None else shrunk.measured.record(),
        "recovered": None if shrunk.recovered is None else shrunk.recovered.record(),
        "left_out": list(shrunk.notes),
        "plan_notes": list(shrunk.plan.notes),
        "seconds": result.seconds,
    }


def _say(result: Result) -> None:
    from collegium.report.shrink_words import findings

    for finding in findings(result.shrunk):
        typer.echo(f"{finding.question} {finding.answer}. {finding.text}")
    for note in result.shrunk.plan.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"model: {result.out}")
    typer.echo(f"page:  {result.page}")
