"""Token embeddings read row by row: the same numbers, less memory, and clear words when the file is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from collegium.errors import CheckpointError, NonFiniteError
from collegium.layerwise import LayerwiseModel
from collegium.models.checkpoint import open_checkpoint
from collegium.offload.embedding import close_rows, leave_on_disk, stored_embedding
from collegium.offload.model import load_offloaded
from tiny import tiny_model


def folder(tmp_path: Path, family: str = "qwen3_moe", **config: Any) -> tuple[Path, Any]:
    model = tiny_model(family, **config).bfloat16()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def on_disk(path: Path) -> LayerwiseModel:
    layerwise = LayerwiseModel(open_checkpoint(path))
    name = stored_embedding(layerwise)
    assert name is not None
    layerwise.fill(name)
    leave_on_disk(layerwise, name)
    return layerwise


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_rows_are_those_of_the_matrix(family: str, tmp_path: Path) -> None:
    path, model = folder(tmp_path, family, tie_word_embeddings=False)
    embedding, whole = on_disk(path).embedding, model.get_input_embeddings()
    last = whole.num_embeddings - 1
    for ids in ([[last]], [[0, 5, 5, last, 1]], [[1], [0]], [[]]):
        index = torch.tensor(ids, dtype=torch.long)
        assert torch.equal(embedding(index), whole(index))
    close_rows(model)  # of one that is in memory there is nothing to close
    with pytest.raises(IndexError, match=str(last)):
        embedding(torch.tensor([[last + 1]]))
    with pytest.raises(IndexError):
        embedding(torch.tensor([[-1]]))


def test_tied_ones_stay_in_memory(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, tie_word_embeddings=True)
    assert stored_embedding(LayerwiseModel(open_checkpoint(path))) is None


def test_scaled_ones_stay_in_memory(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, "gemma4_text", tie_word_embeddings=False)
    assert stored_embedding(LayerwiseModel(open_checkpoint(path))) is None


def test_a_budget_leaves_them_on_the_disk(tmp_path: Path) -> None:
    path, model = folder(tmp_path, tie_word_embeddings=False)
    ids = torch.arange(9)[None]
    with load_offloaded(path, memory="2GiB", context=64) as small, load_offloaded(path, context=64) as whole:
        rows = model.get_input_embeddings().weight.nbytes
        assert whole.budget.weights - small.budget.weights == rows
        with torch.inference_mode():
            assert torch.equal(small.model(ids).logits, whole.model(ids).logits)
        assert small.model.get_input_embeddings().num_embeddings == model.get_input_embeddings().num_embeddings


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path, _ = folder(tmp_path, tie_word_embeddings=False)
    layerwise = on_disk(path)
    info = layerwise.checkpoint.tensors["model.embed_tokens.weight"]
    file = path / info.file
    with open(file, "rb+") as handle:
        handle.seek(info.offset)
        handle.write(b"\xff" * info.shape[1] * 2)
    with pytest.raises(NonFiniteError, match=r"model\.embed_tokens\.weight"):
        layerwise.embedding(torch.tensor([[0]]))
    with open(file, "rb+") as handle:
        handle.truncate(info.offset + 4)
    with pytest.raises(CheckpointError, match="cut off"):
        layerwise.embedding(torch.tensor([[1]]))
    close_rows(layerwise.model)
    with pytest.raises(CheckpointError, match="could not read"):
        layerwise.embedding(torch.tensor([[1]]))
