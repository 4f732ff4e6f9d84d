from __future__ import annotations

import io
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from collegium.errors import ConfigError, StorageError
from collegium.train import read_metrics
from collegium.train.metrics import MetricsFile, open_logger
from collegium.train.progress import ProgressLine


def test_lines_can_be_followed_and_read_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for step in range(150):
            metrics.write({"event": "step", "step": step, "tokens": step * 8, "loss": 1.5})
        # not closed, not flushed: whoever follows the file sees whole lines
        assert len(path.read_text().splitlines()) == 150
        metrics.write({"event": "eval", "step": 149, "tokens": 9, "bits_per_byte": 2.0, "domains": {"lieder": 1.0}})
    table = read_metrics(path)
    assert table.height == 151
    assert table["loss"].null_count() == 1
    assert table.filter(table["event"] == "eval")["domains"].struct.field("lieder").to_list() == [1.0]


def test_reopening_cuts_off_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write({"step": 1})
        kept = metrics.sync()
        metrics.write({"step": 2})
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "lo')  # a kill in the middle of a line
    with MetricsFile(path, kept) as metrics:
        metrics.write({"step": 2})
        assert metrics.sync() == path.stat().st_size
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    with pytest.raises(StorageError, match="recorded 999"):
        MetricsFile(path, 999)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl"), MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write({"step": 1})


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = open_logger("tensorboard", tmp_path, {"run": {"seed": 1}})
    logger.log(3, {"train/loss": 2.5})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.5)]


def test_trackio_gets_the_numbers_and_standard_output_stays_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    fake = types.SimpleNamespace(
        init=lambda **kw: calls.append(("init", kw)),
        log=lambda metrics, step: calls.append(("log", step, metrics)),
        finish=lambda: (calls.append("finish"), sys.stdout.write("bye")),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    logger = open_logger("trackio", tmp_path / "demo", {"a": 1})
    logger.log(3, {"train/loss": 2.5})
    logger.close()
    assert calls == [
        ("init", {"project": "collegium", "name": "demo", "config": {"a": 1}}),
        ("log", 3, {"train/loss": 2.5}),
        "finish",
    ]
    assert capsys.readouterr().out == ""


def test_a_tracker_that_is_not_installed_is_a_setting_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"trackio.*pip install"):
        open_logger("trackio", tmp_path, {})


LINE = {"step": 5, "loss": 2.0, "tokens_per_second": 12345.0, "max_violation": 0.5, "dead_experts": 3}


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with ProgressLine(10, console=Console(file=out, soft_wrap=True)) as line:
        line.advance(5)
        line.show(LINE)
        line.say("a [path] with brackets")
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 5/10  loss 2.0000  12,345 tokens/s  MaxVio 0.50  dead 3  0:00:0")
    assert second == "a [path] with brackets"


def test_a_live_line_on_a_terminal_and_none_when_quiet() -> None:
    out = io.StringIO()
    with ProgressLine(10, console=Console(file=out, force_terminal=True, width=120)) as line:
        line.advance(5)
        line.show({"step": 5, "loss": 2.0, "tokens_per_second": 10.0})
    assert "5/10" in out.getvalue()
    assert "MaxVio" not in out.getvalue()
    silent = io.StringIO()
    with ProgressLine(10, quiet=True, console=Console(file=silent, force_terminal=True)) as line:
        line.show(LINE)
        line.say("nothing")
    assert silent.getvalue() == ""
