"""What the verbs that run a model share: opening it and its tokenizer, and a progress bar on standard error."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from collegium.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from collegium.models.checkpoint import Checkpoint

__all__ = [
    "Device",
    "Dtype",
    "TrustRemoteCode",
    "byte_progress",
    "check_ids",
    "layer_progress",
    "open_folder",
    "open_model",
    "open_tokenizer",
    "token_progress",
]

Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; else the config's.")]
Device = Annotated[str | None, typer.Option("--device", help="Where to run, for example cpu or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Execute code that came with the checkpoint.")
]

DTYPES = ("float32", "bfloat16", "float16")


def open_folder(model: Path, *, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint of a model folder or a shipped model, complete and without code of its own unless that is trusted.

    Raises:
        ModelError, CheckpointError, RemoteCodeError: it is not.
    """
    from collegium.assets import model_folder
    from collegium.models.checkpoint import open_checkpoint, refuse_remote_code

    checkpoint = open_checkpoint(model_folder(model))
    if not trust_remote_code:
        refuse_remote_code(checkpoint.config)
    checkpoint.verify()
    return checkpoint


def open_model(folder: Path, *, dtype: str | None, device: str | None, trust_remote_code: bool) -> Any:
    """The model in `folder`, ready to run, its experts on our compute where transformers lets them be.

    Raises what `load` does, and ConfigError for an unknown dtype or device.
    """
    import torch
    from transformers.utils import logging

    from collegium.models import load
    from collegium.models.checkpoint import open_checkpoint
    from collegium.sites import register

    logging.disable_progress_bar()  # the verbs have their own
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    try:
        place = None if device is None else torch.zeros((), device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ConfigError(f"device {device!r} is not there: {error}") from error
    register()
    config, wanted = open_checkpoint(folder).config, None if dtype is None else getattr(torch, dtype)
    if "shrunk" in (config.get("collegium") or ()):
        from collegium.compress.own import load_own  # most models are not of this format, and it imports much

        return load_own(folder, dtype=wanted, device=place)
    # quantised experts have kernels of their own
    quantised = config.get("quantization_config")
    return load(
        folder,
        dtype=wanted,
        device=place,
        trust_remote_code=trust_remote_code,
        experts_implementation=None if quantised else "collegium",
    )


def open_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer in `folder`.

    Raises:
        CheckpointError: there is none, or transformers cannot open it.
    """
    from transformers import AutoTokenizer

    # without any of these files transformers may make up an empty tokenizer
    if not any(file for pattern in ("*token*", "vocab*", "*.model") for file in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has no tokenizer; put one there with tokenizer.save_pretrained({str(folder)!r})"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files fail anywhere in the tokenizer classes
        raise CheckpointError(f"{folder}: transformers cannot open the tokenizer: {error}") from error


def check_ids(highest: int, model: Any) -> None:
    """Refuse token ids that the model has no embedding for. Raises ConfigError."""
    size = model.get_input_embeddings().num_embeddings
    if highest >= size:
        raise ConfigError(f"the tokenizer gives token {highest}, the model has {size}: they do not belong together")


def token_progress() -> Progress:
    """A progress bar on standard error that counts tokens: done of total, tokens per second, time left."""
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "", style="cyan")

    text = TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} tokens")
    return _progress(text[0], BarColumn(), text[1], Rate(), TimeRemainingColumn())


def byte_progress() -> Progress:
    """A progress bar on standard error that counts bytes."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    return _progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())


def _progress(*columns: ProgressColumn) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # a bar in a log file is noise
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def layer_progress() -> Progress:
    """A progress bar on standard error that counts layers, with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(), TimeRemainingColumn())
    # a bar in a log file is noise
    return Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=600
    )
