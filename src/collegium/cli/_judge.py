"""What ``evaluate`` and ``shrink`` share: judging model folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collegium.errors import ConfigError

if TYPE_CHECKING:
    from collegium.compress.judge_result import Judgement
    from collegium.compress.plan import Plan
    from collegium.data.corpus import Corpus
    from collegium.data.document import Split
    from collegium.models.checkpoint import Checkpoint

__all__ = ["check_same_tokenizer", "judge_folders", "usual_length"]

LENGTH = 512


def judge_folders(
    checkpoint: Checkpoint,
    corpus: Corpus,
    *,
    against: Checkpoint | None = None,
    plan: Plan | None = None,
    names: tuple[str, str] | None = None,
    split: Split | None = "test",
    tokens: int | None = None,
    batch_size: int = 4,
    sequence_length: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> Judgement:
    """Open the models of these folders, judge the first, and show progress on standard error.

    Args:
        plan: as a mask on the first model, which is then compared with itself.
        names: of the two for the record; those of the folders if unsaid.
        sequence_length: see `usual_length` for None.

    Raises:
        ConfigError: the models do not fit in memory or have different tokenizers.
        CollegiumError: whatever `judge` raises.
    """
    from collegium.cli._model import open_model, open_tokenizer, token_progress
    from collegium.compress.judge import judge
    from collegium.compress.judge_maps import expert_maps
    from collegium.compress.judge_memory import check_memory

    if plan is not None:
        from collegium.compress.target import Target

        plan.check(Target.of(checkpoint))
    tokenizer = open_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    if against is not None:
        check_same_tokenizer(tokenizer, checkpoint, against, trust_remote_code=trust_remote_code)
    if device in (None, "cpu"):
        check_memory([checkpoint] if against is None else [checkpoint, against], dtype)

    def opened(one: Checkpoint) -> Any:
        return open_model(one.folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    network = opened(checkpoint)
    if against is not None:
        other, maps = opened(against), expert_maps(checkpoint, against)
    else:
        other, maps = (network if plan is not None else None), None
    folders = (checkpoint.folder.name, checkpoint.folder.name if against is None else against.folder.name)
    name, whole_name = names or folders
    with token_progress() as progress:
        bar = progress.add_task("judging", total=tokens)
        return judge(
            network,
            tokenizer,
            corpus,
            against=other,
            plan=plan,
            maps=maps,
            split=split,
            tokens=tokens,
            sequence_length=sequence_length or usual_length(checkpoint),
            batch_size=batch_size,
            name=name,
            whole_name=whole_name,
            progress=lambda count: progress.advance(bar, count),
        )


def usual_length(checkpoint: Checkpoint) -> int:
    """Tokens in a sequence, if nobody says: 512, or as many as the model has positions for."""
    config = checkpoint.config
    text = config.get("text_config")
    tables = (text if isinstance(text, dict) else {}, config)
    known = [table[key] for table in tables for key in ("max_position_embeddings", "n_positions") if table.get(key)]
    return min(LENGTH, known[0]) if known and isinstance(known[0], int) else LENGTH


def check_same_tokenizer(
    tokenizer: Any, checkpoint: Checkpoint, against: Checkpoint, *, trust_remote_code: bool
) -> None:
    """Raises ConfigError if the second model has another tokenizer than the first."""
    from collegium.cli._model import open_tokenizer
    from collegium.data.tokenize import tokenizer_fingerprint

    other = open_tokenizer(against.folder, trust_remote_code=trust_remote_code)
    mine, theirs = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(other)
    if mine != theirs:
        raise ConfigError(
            f"{checkpoint.folder} and {against.folder} have different tokenizers ({mine} and {theirs}), so their "
            "predictions cannot be compared token by token; evaluate each by itself, bits per byte compare"
        )
