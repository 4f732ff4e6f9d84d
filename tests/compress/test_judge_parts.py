"""The parts of judging with numbers known by hand: router agreement, maps between models, proxies, memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shrinking import made_up_plan

from collegium.compress import apply_plan, judge_memory
from collegium.compress.judge_maps import expert_maps, maps_of
from collegium.compress.judge_memory import check_memory, needed_bytes
from collegium.compress.judge_proxies import proxy_metrics
from collegium.compress.judge_sides import Seen
from collegium.compress.judge_sums import LayerSums
from collegium.errors import CheckpointError, ConfigError
from collegium.models.checkpoint import open_checkpoint
from collegium.routing import Routing
from pruning import plan_of, saved


def seen(index: list[list[int]], E: int, output: list[list[float]]) -> Seen:
    chosen = torch.tensor(index)
    routing = Routing.from_topk(chosen, torch.ones(chosen.shape), E)
    return Seen(torch.empty(0), {0: routing}, {0: torch.tensor(output)})


def test_agreement_by_hand() -> None:
    """Of 4 experts, 0 and 1 became one, 3 is gone: the second token's choice of 3 does not count, padding neither."""
    sums = LayerSums(0, 2, 4, [0, 0, 1, -1])
    whole = seen([[0, 2], [1, 3], [0, 1], [2, 3]], 4, [[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    small = seen([[0, 2], [1, 2], [0, 1], [0, 1]], 2, [[3.0, 4.0], [1.0, 1.0], [1.0, 0.0], [9.0, 9.0]])
    sums.add(small, whole, torch.tensor([True, True, True, False]), torch.tensor([0, 0, 1, 1]))
    found = sums.score()
    # the sentinel 2 of the smaller model is an unused slot
    assert found.present is not None
    assert found.present.value == pytest.approx(5 / 6)
    assert found.agreement is not None
    assert found.agreement.value == pytest.approx(3 / 5), "one of (0, 2), none of (1), both of (0, 1)"
    assert found.output_error is not None
    assert found.output_error.value == pytest.approx((0 + 1) / 2), "an output of length 0 has no relative error"


def test_outputs_of_other_shape_are_not_compared() -> None:
    sums = LayerSums(0, 4, 4, None)
    sums.add(seen([[0]], 4, [[1.0, 2.0]]), seen([[0]], 4, [[1.0, 2.0, 3.0]]), torch.tensor([True]), torch.tensor([0]))
    assert (sums.score().present, sums.score().agreement, sums.score().output_error) == (None, None, None)


def test_a_mask_keeps_the_old_numbers() -> None:
    assert maps_of(made_up_plan([[1, 4], [0, 1]], experts=5)) == {0: [-1, 1, -1, -1, 4], 1: [0, 1, -1, -1, -1]}


def test_maps_lead_through_several_steps(tmp_path: Path) -> None:
    whole = saved(tmp_path, "qwen3_moe")
    apply_plan(plan_of(whole, {0: [0, 2, 3, 5, 7], 1: [0, 1, 2, 3, 4]}), whole, tmp_path / "once")
    apply_plan(plan_of(tmp_path / "once", {0: [1, 2, 4], 1: [0, 3, 4]}), tmp_path / "once", tmp_path / "twice")
    folders = [open_checkpoint(tmp_path / name) for name in ("source", "once", "twice")]
    assert expert_maps(folders[1], folders[0]) == {0: [0, -1, 1, 2, -1, 3, -1, 4], 1: [0, 1, 2, 3, 4, -1, -1, -1]}
    assert expert_maps(folders[2], folders[0]) == {0: [-1, -1, 0, 1, -1, -1, -1, 2], 1: [0, -1, -1, 1, 2, -1, -1, -1]}
    assert expert_maps(folders[2], folders[1]) == {0: [-1, 0, 1, -1, 2], 1: [0, -1, -1, 1, 2]}
    assert expert_maps(folders[0], folders[1]) is None
    assert expert_maps(folders[1], folders[2]) is None
    edit = tmp_path / "twice" / "collegium_edit.json"
    record = json.loads(edit.read_text())
    del record["plan"]["layers"]
    edit.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"collegium_edit\.json is damaged"):
        expert_maps(folders[2], folders[0])


def test_proxies_by_hand() -> None:
    loss = np.log(np.array([2.0, 4.0, 8.0, 16.0]))
    found = proxy_metrics(
        loss, np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 1, 5, 10]), np.array([1, 2, 3, 4]), vocabulary=11, nbytes=8
    )
    assert found["loss/mean"] == pytest.approx(loss.mean())
    assert found["loss/q50"] == pytest.approx(np.median(loss))
    assert found["loss/per_byte"] == pytest.approx(loss.sum() / 8)
    assert found["probability/mean"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 8 + 1 / 16) / 4)
    assert found["rank/mean"] == pytest.approx(16 / 4 / 10)
    assert (found["top1/mean"], found["top5/mean"], found["top10/mean"]) == (0.25, 0.5, 0.75)
    assert found["loss/uncertain"] == pytest.approx(loss[3])
    assert found["loss/certain"] == pytest.approx(loss[0])
    assert found["loss/early"] == pytest.approx(loss[0])
    assert found["entropy/late"] == pytest.approx(0.4)
    assert all(np.isfinite(value) for value in found.values())
    assert not [name for name in proxy_metrics(loss, loss, loss, loss, vocabulary=9, nbytes=None) if "byte" in name]


def test_memory_is_told_from_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, "qwen3_moe"))
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    assert needed_bytes([checkpoint]) == int(1.2 * stored)
    assert needed_bytes([checkpoint, checkpoint], "bfloat16") == int(1.2 * stored), "it is stored as float32"
    monkeypatch.setattr(judge_memory, "available_bytes", lambda: stored)
    with pytest.raises(ConfigError, match="source need about"):
        check_memory([checkpoint])
    check_memory([checkpoint], "bfloat16")
    monkeypatch.setattr(judge_memory, "available_bytes", lambda: None)
    check_memory([checkpoint])


def test_this_machine_has_memory() -> None:
    found = judge_memory.available_bytes()
    assert found is None or found > 1 << 20
