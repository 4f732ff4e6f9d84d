"""``collegium profiles``: which experts each domain uses, and which domain a text is like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.cli._model import Device, Dtype

if TYPE_CHECKING:
    from collegium.compress.profiles import Match, Profiles

__all__ = ["run"]


def run(
    source: Annotated[
        Path, typer.Argument(help="A folder of statistics to make profiles of, or a file of profiles to look into.")
    ],
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model, or demo; else the one the statistics name.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the profiles here.")] = None,
    add: Annotated[
        list[Path] | None, typer.Option("--add", help="Profiles of more domains, to go with these; repeatable.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", "-m", help="The importance score that experts are ranked by.")
    ] = "tcess",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    query: Annotated[str | None, typer.Option("--query", help="Find the domain that this text is like.")] = None,
    distance: Annotated[str, typer.Option("--distance", help="Between keys: l2 or cosine.")] = "l2",
    keep: Annotated[float, typer.Option("--keep", help="Share of the experts to generate with.")] = 0.5,
    generate: Annotated[
        bool, typer.Option("--generate", help="Go on with the text, with the experts of the domain found only.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Stop after so many tokens.")] = 64,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make expert profiles of the domains of statistics, or find the domain that a text is like.

    collegium profiles STATS --out profiles.safetensors

    collegium profiles profiles.safetensors --model MODEL --query "def main():" --generate
    """
    from collegium.errors import ConfigError

    if generate and query is None:
        raise ConfigError("--generate goes on with the text of --query; give one")
    if out is not None and out.exists() and not overwrite:
        raise ConfigError(f"{out} exists; replace it with --overwrite, or choose another")
    profiles = _profiles(source, model, add or [], method)
    if out is not None:
        profiles.save(out)
    if query is None:
        _show(profiles, out, as_json)
        return
    if model is None:
        raise ConfigError("--query runs a part of the model; name it with --model")
    match, text = _query(profiles, model, query, distance, (keep, max_new_tokens) if generate else None, dtype, device)
    _show_match(match, text, as_json)


def _profiles(source: Path, model: Path | None, more: list[Path], method: str) -> Profiles:
    from collegium.cli._planning import target_of
    from collegium.compress.profiles import Profiles
    from collegium.measure.statistics import Statistics

    if source.is_dir():
        statistics = Statistics.load(source)
        profiles = Profiles.from_statistics(statistics, target_of(statistics, model), importance=method)
    else:
        profiles = Profiles.load(source)
    for path in more:
        profiles = profiles.add(Profiles.load(path))
    return profiles


def _query(
    profiles: Profiles,
    model: Path,
    query: str,
    distance: str,
    generate: tuple[float, int] | None,
    dtype: str | None,
    device: str | None,
) -> tuple[Match, str | None]:
    """The match, and the text that was generated, if any."""
    from collegium.cli._model import check_ids, open_folder, open_model, open_tokenizer
    from collegium.compress.profiles import profile_mask
    from collegium.errors import ConfigError

    checkpoint = open_folder(model, trust_remote_code=False)
    known = profiles.meta.fingerprint
    if known is not None and checkpoint.fingerprint != known:
        raise ConfigError(
            f"the profiles are of {profiles.meta.model} with fingerprint {known}; {checkpoint.folder} has "
            f"{checkpoint.fingerprint}: make profiles of this model"
        )
    tokenizer = open_tokenizer(checkpoint.folder, trust_remote_code=False)
    network = open_model(checkpoint.folder, dtype=dtype, device=device, trust_remote_code=False)
    check_ids(max(tokenizer(query).input_ids, default=0), network)
    match = profiles.query(network, tokenizer, query, distance=_distance(distance))
    if generate is None:
        return match, None
    keep, most = generate
    with profile_mask(network, profiles, match.task, keep):
        return match, _generate(network, tokenizer, query, most)


def _distance(name: str) -> Any:
    from collegium.errors import ConfigError

    if name not in ("l2", "cosine"):
        raise ConfigError(f"--distance {name!r} is none of l2, cosine")
    return name


def _generate(network: Any, tokenizer: Any, prompt: str, most: int) -> str:
    """The likeliest token each time."""
    import torch

    ids = list(tokenizer(prompt).input_ids)
    start, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    if start is not None and ids[:1] != [start]:
        ids.insert(0, start)
    given = torch.tensor([ids], device=network.device)
    with torch.inference_mode():
        output = network.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        )
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text


def _show(profiles: Profiles, out: Path | None, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    meta = profiles.meta
    if as_json:
        record = {**meta.model_dump(mode="json"), "file": None if out is None else str(out)}
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    table = Table("task", "tokens", f"first experts of layer {meta.layers[0].layer}")
    E = meta.layers[0].num_experts
    for task, tokens, rank in zip(meta.tasks, meta.tokens, profiles.rank[:, 0, :E], strict=True):
        table.add_row(task, f"{tokens:,}", ", ".join(map(str, rank.argsort()[:8].tolist())))
    Console().print(table)
    typer.echo(f"{meta.model}: {len(meta.layers)} MoE layers, experts ranked by {meta.importance}")
    if out is not None:
        typer.echo(f"written to {out}")


def _show_match(match: Match, text: str | None, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        record = {
            "task": match.task,
            "distances": dict(match.distances),
            "tokens": match.tokens,
            **({} if text is None else {"text": text}),
        }
        typer.echo(json.dumps(record, indent=2, ensure_ascii=False))
        return
    table = Table("task", "distance")
    for name, far in match.distances[:10]:
        table.add_row(name, f"{far:.4f}")
    Console(stderr=text is not None).print(table)
    if text is not None:
        typer.echo(text)
