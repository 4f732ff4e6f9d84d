"""The two models of a recovery: the student, and the teacher it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from collegium import models
from collegium.data.tokenize import tokenizer_fingerprint
from collegium.errors import CheckpointError, ConfigError, UnsupportedFamilyError
from collegium.models.checkpoint import Checkpoint, open_checkpoint, refuse_remote_code
from collegium.sites import register

__all__ = ["Pair", "load_model"]


@dataclass(frozen=True)
class Pair:
    """The two checkpoints, and what is to be known before either is loaded.

    Attributes:
        tokenizer, vocab_size: of both.
        mask_documents: whether attention can be confined to documents: all layers have full attention.
    """

    student: Checkpoint
    teacher: Checkpoint | None
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    mask_documents: bool

    @classmethod
    def open(cls, student: Path, teacher: Path | None, sequence_length: int) -> Pair:
        """Open both, and make sure that one can learn from the other.

        Raises:
            CheckpointError: a folder is incomplete, or the student has no tokenizer.
            ConfigError: vocabularies or tokenizers differ, or sequences are longer than the student's positions.
            UnsupportedFamilyError: the student is quantised, or no decoder-only language model.
            RemoteCodeError: a config asks for code of its own.
        """
        checkpoint, config = _open(student)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedFamilyError(f"{student} is an encoder-decoder; only decoder-only models can be recovered")
        if "quantization_config" in checkpoint.config:
            raise UnsupportedFamilyError(f"{student} is quantised, and cannot be trained; recover first, then quantise")
        text = config.get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        if isinstance(most, int) and sequence_length > most:
            raise ConfigError(f"sequence_length is {sequence_length}; {student} has {most} positions")
        tokenizer = _tokenizer(student)
        if tokenizer is None:
            raise CheckpointError(f"{student} has no tokenizer.json; put the original's there")
        mask = set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        if teacher is None:
            return cls(checkpoint, None, tokenizer, text.vocab_size, mask)
        other, other_config = _open(teacher)
        theirs, their_tokenizer = other_config.get_text_config(), _tokenizer(teacher)
        if theirs.vocab_size != text.vocab_size:
            raise ConfigError(
                f"{student} has a vocabulary of {text.vocab_size} tokens, {teacher} of {theirs.vocab_size}; one "
                "cannot learn what the other predicts"
            )
        if their_tokenizer and tokenizer_fingerprint(their_tokenizer) != tokenizer_fingerprint(tokenizer):
            raise ConfigError(f"the tokenizers of {student} and {teacher} differ; they read the same text as other ids")
        return cls(checkpoint, other, tokenizer, text.vocab_size, mask)


def _open(folder: Path) -> tuple[Checkpoint, Any]:
    checkpoint = open_checkpoint(folder)
    refuse_remote_code(checkpoint.config)
    checkpoint.verify()
    try:
        return checkpoint, AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder}: transformers cannot read its config: {error}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files fail anywhere in the tokenizer classes
        raise CheckpointError(f"{folder}: transformers cannot open the tokenizer: {error}") from error


def load_model(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model in `folder`, in eval mode, its experts on our compute; None is the dtype it is stored in."""
    register()
    quantised = open_checkpoint(folder).config.get("quantization_config")  # their experts have kernels of their own
    return models.load(folder, dtype, experts_implementation=None if quantised else "collegium")
