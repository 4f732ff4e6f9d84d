from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from collegium.errors import ConfigError
from collegium.train import Recipe, build_model
from collegium.train.batches import Order, model_inputs
from collegium.train.prepare import prepare
from collegium.train.ranks import Ranks

Make = Callable[..., Recipe]


def test_every_epoch_is_a_permutation_and_places_mean_the_same_however_they_are_asked_for(recipe: Make) -> None:
    packed = prepare(recipe(), Ranks()).train
    N = len(packed)
    order = Order(packed, seed=3)
    whole = order(0, 3 * N)
    epochs = whole.reshape(3, N)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(N))
    assert not np.array_equal(epochs[0], epochs[1])
    later = Order(packed, seed=3)
    np.testing.assert_array_equal(later(N - 3, 7), whole[N - 3 : N + 4])
    np.testing.assert_array_equal(later(5, 7), whole[5:12])
    assert not np.array_equal(Order(packed, seed=4)(0, N), whole[:N])


def _two_documents() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[7] * 5 + [9] * 7])
    position = torch.tensor([[*range(5), *range(7)]])
    return {"input_ids": ids, "document": document, "position": position, "domain": torch.zeros_like(ids)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_masked_document_is_read_as_if_it_were_alone(recipe: Make, attention: str) -> None:
    model = build_model(recipe(moe=None)).eval()
    model.set_attn_implementation(attention)
    batch = _two_documents()
    packed = model(**model_inputs(batch, model, True)).logits
    for rows in (slice(0, 5), slice(5, 12)):
        alone = model(input_ids=batch["input_ids"][:, rows]).logits
        torch.testing.assert_close(packed[:, rows], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unmasked_documents_see_what_precedes_them(recipe: Make) -> None:
    model = build_model(recipe(moe=None)).eval()
    batch = _two_documents()
    inputs = model_inputs(batch, model, False)
    torch.testing.assert_close(model(**inputs).logits, model(input_ids=batch["input_ids"]).logits)
    before = model(**inputs).logits[:, 5:]
    batch["input_ids"][0, 0] += 1
    assert not torch.allclose(model(**model_inputs(batch, model, False)).logits[:, 5:], before)


def test_masking_is_refused_where_it_would_replace_a_sliding_window(recipe: Make) -> None:
    plan = recipe(moe=None, model__config={"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1})
    model = build_model(plan)
    with pytest.raises(ConfigError, match="sliding_attention"):
        model_inputs(_two_documents(), model, True)
