"""The simulator's times by hand, part by part, and the stopwatch that measures them in a running engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import saved

from collegium.errors import ConfigError
from collegium.offload.cost import CostModel
from collegium.offload.model import load_offloaded
from collegium.offload.policies import find_policy
from collegium.offload.simulate import Simulation, SimulationSettings, simulate
from collegium.offload.simulate_link import Link, Read
from collegium.offload.simulate_times import Stopwatch, line, link_times
from measure_traces import make_trace

# an expert takes 1 s to compute and 2 s on the link, the rest of a layer 1 s, of a pass 10 s
COST = CostModel(
    read_bandwidth=500,
    read_latency=0,
    memory_bandwidth=1000,
    layer_seconds=1,
    outside_seconds=10,
    measured="a test",
)


def read(expert: int, submitted: float = 0.0, ahead: bool = False) -> Read:
    return Read(8, 0, expert, 2.0, ahead, submitted)


def ends(link: Link, count: int) -> list[float | None]:
    return [link.next().end for _ in range(count)]


class TestLink:
    def test_one_reader_waits_for_each_delay(self) -> None:
        link = Link(readers=1, delay=0.5)
        for expert in range(3):
            link.submit(read(expert))
        assert ends(link, 3) == [2.5, 5.0, 7.5]
        assert link.busy == 6

    def test_delays_of_several_readers_pass_behind_the_bytes_of_others(self) -> None:
        link = Link(readers=3, delay=0.5)
        for expert in range(5):
            link.submit(read(expert))
        assert ends(link, 5) == [2.5, 4.5, 6.5, 8.5, 10.5]

    def test_a_delay_longer_than_the_others_bytes_shows(self) -> None:
        link = Link(readers=2, delay=3.0)
        for expert in range(4):
            link.submit(read(expert))
        # two begin at 0; the third begins at 5, when the first has come, its bytes at 8; the fourth at 7 and 10
        assert ends(link, 4) == [5.0, 7.0, 10.0, 12.0]

    def test_nothing_begins_while_no_processor_is_free(self) -> None:
        link = Link(readers=2)
        link.submit(read(0, submitted=1.0))
        link.hold(1.0, 4.0)
        assert link.advance(4.0) == []
        assert ends(link, 1) == [6.0]
        # what began before goes on; what waits for a reader that is freed meanwhile begins after
        link = Link(readers=1)
        link.submit(read(0))
        link.submit(read(1))
        assert link.advance(1.0) == []
        link.hold(1.0, 3.0)
        [first] = link.advance(3.0)
        assert first.end == 2.0
        assert ends(link, 1) == [5.0]

    def test_demand_overtakes_what_has_not_begun(self) -> None:
        link = Link(readers=2)
        ahead = [read(expert, ahead=True) for expert in range(4)]
        for one in ahead:
            link.submit(one)
        assert link.advance(1.0) == []  # two of them are under way now
        link.submit(read(9, submitted=1.0))
        assert link.call_off(0) == ahead[2:]
        link.submit(ahead[3])
        link.hurry(ahead[3])
        assert [link.next().expert for _ in range(4)] == [0, 1, 9, 3]


def simulated(folder: Path, **times: Any) -> Simulation:
    """Two tokens of two experts each, with room for two: token 1 finds expert 0 there, and not expert 2."""
    trace = make_trace(folder, {0: [[0, 1], [0, 2]]}, 3, weights={0: [[0.6, 0.4]] * 2})
    asked = SimulationSettings(find_policy("lru"), 2, {16: 1000})
    return simulate(trace, asked, COST.model_copy(update=times))


def test_each_time_by_hand(tmp_path: Path) -> None:
    # token 0: layer until 1; reads come at 3 and 5, and are computed until 4 and 6. Token 1: layer until 17, expert 0
    # until 18, expert 2 has come at 19, until 20
    plain = simulated(tmp_path / "a")
    assert plain.spent.tolist() == [16, 14]
    assert plain.stall.tolist() == [2 + 1 + 1]
    # a call's own time: expert 1 waits for half a second less, and each call takes it
    called = simulated(tmp_path / "b", call_seconds=0.5)
    assert called.spent.tolist() == [16.5, 14.5]
    assert called.computing == 4 + 4 * 0.5
    # a delay before the first bytes of both tokens, and 0.25 s until each of three waits is over
    late = simulated(tmp_path / "c", readers=2, read_delay=0.5, wake_seconds=0.25)
    assert late.spent.tolist() == [16.75, 14.75]
    assert late.stall.tolist() == [2.75 + 1.0 + 1.75]
    # without a processor to spare the read of expert 2 begins once expert 0 is computed
    busy = simulated(tmp_path / "d", spare=False)
    assert busy.spent.tolist() == [16, 15]
    for one in (called, late, busy):  # times move no request
        for column in ("step", "layer", "expert", "found", "evicted", "bytes"):
            np.testing.assert_array_equal(one.log[column], plain.log[column])


def test_a_line_through_the_means() -> None:
    assert line([1, 1, 2, 2], [1.0, 3.0, 3.0, 5.0]) == pytest.approx((0, 2))
    assert line([1, 2, 3], [3.0, 5.0, 7.0]) == pytest.approx((1, 2))
    assert line([4, 4], [1.0, 2.0]) == (1.5, 0)
    assert line([1, 2, 2], [4.0, 1.0, 1.0]) == (2, 0)  # nothing gets cheaper by more work
    assert line([1, 2], [1.0, 4.0]) == pytest.approx((0, 9 / 5))  # and no work costs less than nothing


def test_rate_and_delay_from_reads() -> None:
    queued = [(0.0, 2.5, 1000), (0.1, 4.5, 1000), (0.2, 6.5, 1000), (10.0, 12.5, 1000)]
    assert link_times(queued) == pytest.approx((500, 0.5))
    assert link_times(queued[::-1]) == pytest.approx((500, 0.5))
    assert link_times([(0.0, 2.0, 1000), (3.0, 5.0, 1000)]) == pytest.approx((500, 0))
    assert link_times([(0.0, 1.0, 1000), (0.5, 3.0, 1000)])[1] == 0


def test_a_stopwatch_takes_the_times_of_an_engine(tmp_path: Path) -> None:
    folder, _ = saved("qwen3_moe", tmp_path / "model")
    with load_offloaded(folder, experts=8, context=64) as found, torch.inference_mode():
        meter, first = found.engine.meter, found.model(input_ids=torch.arange(3, 20)[None], use_cache=True)
        with Stopwatch(found.engine) as watch:
            assert found.engine.meter is watch
            with pytest.raises(ConfigError, match="at least two tokens"):
                watch.cost(COST)
            for token in range(3, 15):
                found.model(input_ids=torch.tensor([[token]]), past_key_values=first.past_key_values, use_cache=True)
            found.model(input_ids=torch.arange(3, 40)[None])
        assert found.engine.meter is meter
        assert "read" not in vars(found.source)
        reads = found.counters()["read_bytes"]
        cost = watch.cost(COST)
        found.model(input_ids=torch.tensor([[20]]), past_key_values=first.past_key_values, use_cache=True)
        assert found.counters()["read_bytes"] > reads  # and the engine goes on
    assert watch.cost(COST) == cost
    assert cost.layer_seconds > 0
    assert cost.outside_seconds > 0
    assert cost.call_seconds + cost.expert[32][0][1] > 0
    assert cost.expert[32][1][0] > 5  # rows of an expert in the prompt
    assert cost.read_bandwidth != COST.read_bandwidth
    assert (cost.readers, cost.memory_bandwidth) == (3, COST.memory_bandwidth)
    assert cost.measured == "a test; 11 tokens written one by one"
