"""Router edits, over all members of the kind: what they must leave alone, and what each is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from collegium.catalog import methods
from collegium.compress.router_edits import RouterRows, edit_router, edit_vector
from collegium.errors import ConfigError

EDITS = [one.name for one in methods("router_edit")]
MIXING = torch.tensor([[0.75, 0.25, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.5, 0.5]], dtype=torch.float64)
DOMINANT = torch.tensor([0, 2, 3])


def router(biased: bool = False, **changes: Any) -> RouterRows:
    generator = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = {
        "rows": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "bias": torch.randn(5, generator=generator, dtype=torch.float64) if biased else None,
        "mixing": MIXING,
        "dominant": DOMINANT,
        "inputs": torch.randn(400, 7, generator=generator, dtype=torch.float64),
    }
    return RouterRows(**(fields | changes))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", EDITS)
def test_an_expert_that_is_alone_keeps_its_row(mode: str, bias: bool) -> None:
    given = router(bias)
    rows, new = edit_router(given, mode, {})
    assert rows.shape == (3, 7)
    assert torch.equal(rows[1], given.rows[2])
    assert (new is None) == (not bias)
    if new is not None and given.bias is not None:
        assert new.shape == (3,)
        assert new[1] == given.bias[2]
    assert bool(torch.isfinite(rows).all())


@pytest.mark.parametrize("mode", EDITS)
def test_members_with_one_row_keep_it(mode: str) -> None:
    """Two experts that every token likes alike are, together, as liked as one of them (and a constant)."""
    rows = router().rows.clone()
    rows[1], rows[4] = rows[0], rows[3]
    new, _ = edit_router(router(rows=rows, bias=torch.zeros(5, dtype=torch.float64)), mode, {})
    torch.testing.assert_close(new, rows[DOMINANT], rtol=0.01, atol=0.01)


def test_the_fit_is_the_best_linear_row() -> None:
    given = router()
    rows, _ = edit_router(given, "lse_fit", {"ridge": 0.0})
    assert given.inputs is not None
    wanted = (given.inputs @ given.rows.T)[:, [3, 4]].logsumexp(1)

    def error(row: torch.Tensor) -> float:
        assert given.inputs is not None
        return float((given.inputs @ row - wanted).square().mean())

    for other in (given.rows[3], edit_router(given, "freq_avg", {})[0][2], rows[2] * 1.01):
        assert error(rows[2]) < error(other)


def test_averages_have_the_length_of_the_dominant() -> None:
    rows, _ = edit_router(router(), "freq_avg", {})
    torch.testing.assert_close(rows.norm(dim=1), router().rows[DOMINANT].norm(dim=1))
    plain, _ = edit_router(router(), "freq_avg", {"rescale": False})
    torch.testing.assert_close(plain[0], 0.75 * router().rows[0] + 0.25 * router().rows[1])


def test_selection_biases() -> None:
    values = torch.arange(5.0, dtype=torch.float64)
    assert edit_vector(values, MIXING, DOMINANT, "rows").tolist() == [0, 2, 3]
    assert edit_vector(values, MIXING, DOMINANT, "freq_avg").tolist() == [0.25, 2, 3.5]


def test_wrong_input() -> None:
    with pytest.raises(ConfigError, match="no router_edit is named 'x'; there are"):
        edit_router(router(), "x", {})
    with pytest.raises(ConfigError, match="needs the statistic x_sample"):
        edit_router(router(inputs=None), "lse_fit", {})
    with pytest.raises(ConfigError, match=r"lse_fit.*unexpected keyword"):
        edit_router(router(), "lse_fit", {"rigde": 1.0})
