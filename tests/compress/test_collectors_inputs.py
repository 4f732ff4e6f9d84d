"""Samples of router inputs do not depend on how tokens come, and can be merged; second moments are those of inputs."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import pytest
import torch
from shrinking import batches
from test_collectors import Seen, run

from collegium.compress.collectors import InputMoment, InputSample
from collegium.compress.collectors_inputs import _keys
from collegium.errors import ConfigError, StatisticsError, UnsupportedFamilyError
from collegium.measure.statistics import Entry, Statistics, StatisticsMeta, lowest
from collegium.sites import sites, tap
from tiny import tiny_model


def same_sample(a: Statistics, b: Statistics) -> bool:
    return all(a.get(layer, name).equal(b.get(layer, name)) for layer in a.layers for name in ("x_key", "x_sample"))


def test_all_inputs_are_kept_where_they_are_few_and_their_moment_is_summed() -> None:
    model, recorder = tiny_model("qwen3_moe"), Seen()
    with tap(model, recorder):
        found = run(model, InputSample(), InputMoment())
    valid = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches()])
    for site in sites(model):
        x = torch.cat(recorder.inputs[site.path])[valid]
        sample, keys = found.get(site.layer, "x_sample"), found.get(site.layer, "x_key")
        assert len(sample) == len(keys) == len(x)
        assert (keys.diff() > 0).all()
        assert (keys >= 0).all()
        assert sorted(sample.tolist()) == sorted(x.tolist())
        torch.testing.assert_close(found.get(site.layer, "c_in").float(), x.T @ x, rtol=1e-5, atol=1e-5)


def test_a_sample_depends_on_neither_order_nor_cuts() -> None:
    model, given = tiny_model("qwen3_moe"), batches(4)
    whole = run(model, InputSample(rows=7), batches=given)
    assert whole.get(0, "x_sample").shape == (7, 32)
    assert same_sample(whole, run(model, InputSample(rows=7), batches=given[::-1]))
    parts = [run(model, InputSample(rows=7), batches=[one]) for one in given]
    assert same_sample(whole, reduce(Statistics.add, parts))
    a, b, c, d = parts
    assert same_sample(whole, d.add(c.add(a)).add(b))
    assert same_sample(whole, whole.add(whole))
    every = run(model, InputSample(), batches=given)
    assert every.get(0, "x_key")[:7].equal(whole.get(0, "x_key"))


def test_keys_are_uniform_and_tell_tokens_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 16, generator=generator)
    place = torch.arange(4000)
    for keys in (
        _keys(x, place * 0, place * 0),
        _keys(x[:1].expand(4000, 16), place * 0, place),
        _keys(x[:1].expand(4000, 16), place, place * 0),
    ):
        assert len(keys.unique()) == 4000
        shares = torch.bincount(keys >> 59, minlength=16) / 4000
        assert ((shares - 1 / 16).abs() < 0.02).all()
    assert _keys(x[:2], place[:2], place[:2]).equal(_keys(x, place, place)[:2])


def test_the_smallest_distinct_keys() -> None:
    assert lowest(torch.tensor([5, 3, 5, 1, 3]), 9).tolist() == [3, 1, 0]
    assert lowest(torch.tensor([5, 3, 5, 1, 3]), 2).tolist() == [3, 1]
    assert lowest(torch.zeros(0, dtype=torch.int64), 2).tolist() == []


def test_saved_samples_are_loaded_and_checked(tmp_path: Path) -> None:
    found = run(tiny_model("qwen3_moe"), InputSample(rows=5))
    found.save(tmp_path / "s")
    assert same_sample(Statistics.load(tmp_path / "s"), found)
    for tensor in (found.get(0, "x_sample")[:4], found.get(0, "x_sample").double()):
        with pytest.raises(StatisticsError, match="x_sample"):
            Statistics(found.meta, {**found.tensors, (0, "x_sample"): tensor})
    long = {(0, "x_key"): torch.arange(6), (0, "x_sample"): torch.zeros(6, 32)}
    with pytest.raises(StatisticsError, match=r"x_key.*\[6\], not int64 \[5\]"):
        Statistics(found.meta, {**found.tensors, **long})


def test_entries_that_make_no_sense_are_refused() -> None:
    for axes, merge, of, dtype in [
        (("R",), "sum", None, "float64"),
        (("E",), "lowest", None, "int64"),
        (("R", "d"), "lowest", None, "int64"),
        (("R", "d"), "rows", None, "float32"),
        (("d", "R"), "rows", "x_key", "float32"),
    ]:
        with pytest.raises(ValueError, match="statistic 'x'"):
            Entry(name="x", collector="c", axes=axes, merge=merge, of=of, dtype=dtype)
    meta = run(tiny_model("qwen3_moe"), InputSample()).meta.model_dump()
    for rows in (None, 0, "many"):
        with pytest.raises(ValueError, match="setting rows"):
            StatisticsMeta.model_validate(
                {**meta, "collectors": {**meta["collectors"], "input_sample": {"rows": rows}}}
            )


def test_routers_that_read_something_else_are_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match=r"nemotron_h.*input_sample"):
        run(tiny_model("nemotron_h", moe_latent_size=16), InputSample())
    with pytest.raises(ConfigError, match="at least 1"):
        InputSample(rows=0)
