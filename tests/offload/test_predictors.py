"""Predictors: one contract for all of them, and what each knows on routing that is known."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from collegium.catalog import methods
from collegium.errors import CheckpointError, ConfigError, TraceError
from collegium.offload.gates import ModelGates
from collegium.offload.geometry import Geometry
from collegium.offload.predictors import find_predictor
from collegium.offload.predictors.activation_matrix import ActivationMatrix
from collegium.offload.predictors.base import Moment, Predictor
from collegium.offload.predictors.frequency import Frequency
from collegium.offload.predictors.gate_reuse import GateReuse
from collegium.offload.predictors.path import Path as PathTable
from collegium.offload.predictors.recall import recall
from collegium.offload.predictors.routing_path import META, TENSORS, RoutingPath, RoutingPathPredictor
from collegium.offload.predictors.rows import Fitted, Rows
from collegium.offload.predictors.tables import CountTable
from collegium.offload.predictors.token_id import TokenId
from collegium.sites import sites, tap
from collegium.trace import Trace, record
from measure_traces import make_trace
from tiny import tiny_inputs, tiny_model

GEOMETRY = Geometry(experts=(6, 8, 7), top_k=(2, 3, 2), layers=(1, 2, 4))
D = 5
SMALL = "routing_path:steps=3,width=16,window=8,blocks=1"
NAMES = ["frequency", "token_id", "path", "gate_reuse:depth=2", "activation_matrix", SMALL]


class FakeGates:
    """Routers that look at the sum of their input."""

    def scores(self, layer: int, gate_input: torch.Tensor, seen_at: int) -> torch.Tensor:
        E = GEOMETRY.experts[layer]
        scores = torch.sin(gate_input.sum(1, keepdim=True) * torch.arange(1, E + 1) + layer)
        scores[:, 0] = -torch.inf
        return scores


def routing(rng: np.random.Generator, N: int) -> list[np.ndarray]:
    pairs = zip(GEOMETRY.experts, GEOMETRY.top_k, strict=True)
    return [np.stack([rng.permutation(E)[:K] for _ in range(N)]) for E, K in pairs]


def random_trace(folder: Path, N: int = 60, seed: int = 0) -> Trace:
    rng = np.random.default_rng(seed)
    experts = dict(zip(GEOMETRY.layers, routing(rng, N), strict=True))
    sizes = dict(zip(GEOMETRY.layers, GEOMETRY.experts, strict=True))
    return make_trace(folder, experts, sizes, tokens=rng.integers(0, 9, N), sequences=np.arange(N) // 10)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return random_trace(tmp_path_factory.mktemp("predictors") / "t")


@pytest.fixture(scope="module")
def built(trace: Trace) -> dict[str, Predictor]:
    return {name: find_predictor(name).build(GEOMETRY, trace=trace, gates=FakeGates()) for name in NAMES}


def walk(predictor: Predictor, tokens: np.ndarray, experts: list[np.ndarray], x: torch.Tensor) -> list[list[Any]]:
    """Predictions at each moment of one pass of a new sequence."""
    predictor.begin()
    found = []
    for layer in range(-1, GEOMETRY.num_layers):
        moment = Moment(layer, tokens, tuple(experts[: layer + 1]), x if layer >= 0 else None)
        found.append([(one.layer, one.scores) for one in predictor.predict(moment)])
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(m == n and np.array_equal(x, y) for (m, x), (n, y) in zip(a, b, strict=True))


def test_every_member_is_tested_here() -> None:
    assert {one.name for one in methods("predictor")} == {name.partition(":")[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 50])
def test_contract(built: dict[str, Predictor], name: str, T: int) -> None:
    """Finite scores of coming layers only, nearest first, within the horizon; and the same when asked again."""
    rng = np.random.default_rng(T)
    predictor, experts, x = built[name], routing(rng, T), torch.randn(T, D)
    tokens = rng.integers(0, 40, T)  # most of these ids were never met
    experts[1][0] = GEOMETRY.experts[1]  # a token without experts
    found = walk(predictor, tokens, experts, x)
    for layer, at in enumerate(found, start=-1):
        ahead = [m - layer for m, _ in at]
        assert ahead == list(range(1, len(ahead) + 1))
        assert len(ahead) <= predictor.horizon
        assert layer + len(ahead) < GEOMETRY.num_layers
        for m, scores in at:
            assert scores.shape == (GEOMETRY.experts[m],)
            assert np.isfinite(scores).all()
    assert any(found)
    assert all(map(same, found, walk(predictor, tokens, experts, x)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_known_of_later_layers(built: dict[str, Predictor], name: str) -> None:
    """Other experts from layer m on change no prediction that was made before m."""
    rng = np.random.default_rng(3)
    tokens, experts, x = rng.integers(0, 9, 4), routing(rng, 4), torch.randn(4, D)
    before = walk(built[name], tokens, experts, x)
    for m in range(GEOMETRY.num_layers):
        changed = [*experts[:m], *routing(rng, 4)[m:]]
        after = walk(built[name], tokens, changed, x)
        assert all(map(same, before[: m + 1], after[: m + 1]))


@pytest.mark.parametrize("name", NAMES)
def test_fitting_is_deterministic(trace: Trace, built: dict[str, Predictor], name: str) -> None:
    again = find_predictor(name).build(GEOMETRY, trace=trace, gates=FakeGates())
    tokens, x = np.array([1, 2, 77]), torch.randn(3, D)
    experts = routing(np.random.default_rng(0), 3)
    assert all(map(same, walk(again, tokens, experts, x), walk(built[name], tokens, experts, x)))


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("gate")])
def test_nothing_to_fit_on(name: str) -> None:
    settings = find_predictor(name)
    assert isinstance(settings, Fitted)
    nothing = Rows(np.zeros(0, np.int64), tuple(np.zeros((0, 2), np.uint8) for _ in range(3)), np.zeros(1, np.int64))
    for at in walk(
        settings.fit(GEOMETRY, nothing), np.array([3]), routing(np.random.default_rng(0), 1), torch.zeros(1, D)
    ):
        assert all(np.isfinite(scores).all() for _, scores in at)


def test_what_is_missing_is_said(trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fitted on a trace"):
        Frequency().build(GEOMETRY)
    with pytest.raises(ConfigError, match="asks the model's routers"):
        GateReuse().build(GEOMETRY, trace=trace)
    with pytest.raises(ConfigError, match="Fit TokenId on a trace of this model"):
        TokenId().build(Geometry((6, 8), (2, 2), (1, 2)), trace=trace)
    with pytest.raises(ConfigError, match=r"no predictor is named 'oracle'.*gate_reuse"):
        find_predictor("oracle")
    with pytest.raises(ConfigError, match="no setting 'deep'; did you mean 'depth'"):
        find_predictor("gate_reuse:deep=2")
    with pytest.raises(ConfigError, match="depth must be at least 1"):
        find_predictor("gate_reuse:depth=0")
    with pytest.raises(ConfigError, match="setting 'depth'"):
        find_predictor("gate_reuse:depth=two")
    with pytest.raises(ConfigError, match="key=value"):
        find_predictor("gate_reuse:depth")
    one = make_trace(tmp_path / "t", {0: [[0]]}, 2)
    with pytest.raises(TraceError, match="it has one"):
        recall(Frequency(), one)
    with pytest.raises(TraceError, match="no router inputs"):
        recall(GateReuse(), trace, gates=FakeGates())


# ---- tables ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 5), st.integers(0, 4), st.integers(0, 4)), max_size=30), st.integers(1, 6))
def test_count_table_against_a_loop(rows: list[tuple[int, int, int]], T: int) -> None:
    E = 4  # id 4 is an unused slot
    keys = np.array([key for key, _, _ in rows], np.int64)
    experts = np.array([pair for _, *pair in rows], np.uint8).reshape(-1, 2)
    asked = np.arange(-3, -3 + T)
    back_off = np.random.default_rng(T).random((T, E), np.float32)
    found = CountTable(keys, experts, E).rates(asked, back_off)
    for t, key in enumerate(asked):
        counts, met = back_off[t].astype(float).copy(), 0
        for other, *pair in rows:
            met += other == key
            for expert in pair if other == key else ():
                if expert < E:
                    counts[expert] += 1
        np.testing.assert_allclose(found[t], counts / (met + 1), rtol=1e-5)


def test_token_id_and_its_back_off(tmp_path: Path) -> None:
    token = np.arange(40) % 4
    trace = make_trace(tmp_path / "t", {0: token[:, None], 1: (token[:, None] + 1) % 4}, 6, tokens=token)
    predictor = TokenId().build(Geometry.of_trace(trace.meta), trace=trace)
    first, second = predictor.predict(Moment(-1, np.array([2])))
    assert (first.scores.argmax(), second.scores.argmax()) == (2, 3)
    assert (first.scores[2], first.scores[4]) == (pytest.approx((10 + 0.25) / 11), 0)
    both = predictor.predict(Moment(-1, np.array([2, 2, 1])))[0].scores
    assert np.argsort(-both)[:2].tolist() == [2, 1]
    unseen = predictor.predict(Moment(-1, np.array([9])))[0].scores
    np.testing.assert_allclose(unseen, [0.25] * 4 + [0] * 2)


def test_path_needs_both_layers_before(tmp_path: Path) -> None:
    """The third layer's expert follows from the two layers before together, and from neither alone."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 400), rng.integers(0, 4, 400)
    c = (a + b) % 4
    trace = make_trace(tmp_path / "t", {0: a[:, None], 1: b[:, None], 2: c[:, None]}, 4, sequences=np.arange(400) // 10)
    found = {(one.layer, one.distance): one.value.value for one in recall(PathTable(), trace)}
    assert found.keys() == {(0, 1), (1, 1), (2, 1)}
    assert found[2, 1] == 1
    assert found[1, 1] < 0.5
    predictor = PathTable().build(Geometry.of_trace(trace.meta), trace=trace)
    moment = Moment(1, np.array([0]), (np.array([[3]]), np.array([[2]])))
    assert predictor.predict(moment)[0].scores.argmax() == 1


def test_path_keys_have_no_order(built: dict[str, Predictor]) -> None:
    tokens, experts = np.array([1]), routing(np.random.default_rng(5), 1)
    turned = [used.copy() for used in experts]
    for used in turned:
        used[0, :2] = used[0, 1::-1]
    moments = [Moment(1, tokens, tuple(used[:2])) for used in (experts, turned)]
    a, b = (built["path"].predict(moment)[0].scores for moment in moments)
    np.testing.assert_array_equal(a, b)


def test_activation_matrix_finds_the_document_alike(tmp_path: Path) -> None:
    """Each of two kinds of documents has experts of its own in both layers; one use tells which kind it is."""
    kind = (np.arange(120) // 10) % 2
    experts = {0: np.stack([kind * 3, kind * 3 + 1], 1), 1: np.stack([kind * 3 + 1, kind * 3 + 2], 1)}
    trace = make_trace(tmp_path / "t", experts, 6, sequences=np.arange(120) // 10)
    predictor = ActivationMatrix(capacity=4).build(Geometry.of_trace(trace.meta), trace=trace)
    for which in (1, 0):
        predictor.begin()
        first = predictor.predict(Moment(-1, np.array([0])))[1].scores
        assert first[1] == first[4]  # nothing is known yet
        (second,) = predictor.predict(Moment(0, np.array([0]), (np.array([[3 * which, 3 * which + 1]]),)))
        assert set(np.argsort(-second.scores)[:2]) == {3 * which + 1, 3 * which + 2}


# ---- gate reuse --------------------------------------------------------------------------------------------------


def unchanging() -> Any:
    """Qwen3-MoE whose blocks add nothing to the residual stream: every layer's input is the same but for its norm."""
    torch.manual_seed(0)
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "experts.down_proj")):
            nn.init.zeros_(weight)
        if name.endswith("layernorm.weight"):
            nn.init.normal_(weight, mean=1.0, std=0.5)
    return model


def test_gates_account_for_norms_from_the_first_pass_on() -> None:
    model = unchanging()
    seen: list[Any] = []

    class See:
        view = "gate"

        def __call__(self, site: Any, x: torch.Tensor, routing: Any) -> None:
            seen.append((x.detach(), routing.to_topk()[0]))

    with torch.no_grad(), tap(model, See()):
        model(**tiny_inputs(model))
    predictor = GateReuse(depth=2).build(geometry_of(model), gates=ModelGates(model))
    (x, _), *later = seen
    for t in range(3):  # one token at a time, of layers whose own inputs were never seen
        found = predictor.predict(Moment(0, np.array([0]), (), x[t : t + 1]))
        assert [one.layer for one in found] == [1, 2]
        for one, (_, chosen) in zip(found, later, strict=True):
            assert set(np.argsort(-one.scores)[:2]) == set(chosen[t].tolist())
    with pytest.raises(ConfigError, match="MoE layers are 0 to 2"):
        ModelGates(model).scores(3, x, 0)


def geometry_of(model: nn.Module) -> Geometry:
    found = sites(model)
    return Geometry(
        tuple(one.num_experts for one in found), tuple(one.top_k for one in found), tuple(one.layer for one in found)
    )


def test_gates_leave_the_model_as_it_is() -> None:
    model = unchanging()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = ModelGates(model)
    gates.scores(1, torch.randn(4, 32), 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_votes_of_one_token_do_not_outweigh_the_others() -> None:
    class Loud:
        def scores(self, layer: int, gate_input: torch.Tensor, seen_at: int) -> torch.Tensor:
            return torch.tensor([[1e6, 9e5, 0.0, -1e6], [0.0, 0.1, 3.0, 2.9], [0.0, 0.1, 3.0, 2.9]])

    geometry = Geometry((4, 4), (2, 2), (0, 1))
    (found,) = GateReuse().build(geometry, gates=Loud()).predict(Moment(0, np.zeros(3), (), torch.zeros(3, 2)))
    assert np.argsort(-found.scores)[:2].tolist() == [2, 3]


def test_recall_of_gate_reuse_is_that_of_the_metric(tmp_path: Path) -> None:
    from collegium.measure.predict import predictability

    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 64, (8, 12))}]
    trace = record(model, batches, tmp_path / "t", gate_inputs=0.5)
    known = {at.layer: at.recall["gate input"].value for at in predictability(trace, model) if at.layer > 0}
    found = recall(GateReuse(depth=2), trace, gates=ModelGates(model))
    assert [(one.distance, one.layer) for one in found] == [(1, 1), (1, 2), (2, 2)]
    for one in found[:2]:
        assert one.value.value == pytest.approx(known[one.layer], abs=0.02)
    wide = recall(GateReuse(), trace, gates=ModelGates(model), width=8)
    assert [one.value.value for one in wide] == [1, 1]  # all experts are named


# ---- recall ------------------------------------------------------------------------------------------------------


def test_recall_is_of_documents_it_was_not_fitted_on(tmp_path: Path) -> None:
    """Each document has a token id and experts of its own: in sample that is known exactly, held out not at all."""
    home = np.random.default_rng(0).permutation(24)
    document = np.arange(120) // 10
    experts = np.stack([home[2 * document], home[2 * document + 1]], 1)
    trace = make_trace(tmp_path / "t", {0: experts}, 24, tokens=document, sequences=document)
    (found,) = recall(TokenId(), trace)
    assert (found.layer, found.distance, found.value.value) == (0, 1, 0)
    fitted = TokenId().build(Geometry.of_trace(trace.meta), trace=trace)
    scores = fitted.predict(Moment(-1, np.array([3])))[0].scores
    assert set(np.argsort(-scores)[:2]) == set(experts[30].tolist())


def test_recall_of_chance(trace: Trace) -> None:
    found = {(one.layer, one.distance): one for one in recall(Frequency(), trace)}
    assert found.keys() == {(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 3)}
    assert found[4, 1].value == found[4, 3].value
    assert len(recall(Frequency(), trace, max_tokens=5)) == 6


# ---- routing path ------------------------------------------------------------------------------------------------


def context_trace(folder: Path) -> Trace:
    """The expert is that of the token before: only who reads the context can know it."""
    rng = np.random.default_rng(0)
    token = rng.integers(0, 4, 2000)
    start = np.arange(2000) % 20 == 0
    before = np.where(start, 0, np.roll(token, 1))
    return make_trace(
        folder, {0: before[:, None], 1: token[:, None]}, 4, tokens=token, sequences=np.arange(2000) // 20,
        part_rows=4096,
    )  # fmt: skip


def test_routing_path_reads_the_context(tmp_path: Path) -> None:
    trace = context_trace(tmp_path / "t")
    settings = RoutingPath(width=32, blocks=2, window=8, steps=120, lr=5e-3)
    found = {(one.layer, one.distance): one.value.value for one in recall(settings, trace, max_tokens=200)}
    assert found[0, 1] > 0.9
    assert found[1, 2] > 0.95
    table = {(one.layer, one.distance): one.value.value for one in recall(TokenId(), trace, max_tokens=200)}
    assert table[0, 1] < 0.6


def test_a_prompt_is_read_as_its_tokens_one_by_one(tmp_path: Path) -> None:
    predictor = find_predictor(SMALL).build(GEOMETRY, trace=random_trace(tmp_path / "t"))
    tokens = np.arange(6)
    predictor.begin()
    whole = [one.scores for one in predictor.predict(Moment(-1, tokens))]
    predictor.begin()
    alone = [[one.scores for one in predictor.predict(Moment(-1, tokens[t : t + 1]))] for t in range(6)]
    for layer, scores in enumerate(whole):
        np.testing.assert_allclose(scores, np.sum([at[layer] for at in alone], axis=0), rtol=1e-4, atol=1e-5)


def test_routing_path_is_saved_and_read(tmp_path: Path, trace: Trace) -> None:
    settings = find_predictor(SMALL)
    assert isinstance(settings, RoutingPath)
    predictor = settings.fit(GEOMETRY, Rows.of(trace))
    predictor.save(tmp_path / "p", fingerprint="abc")
    again = find_predictor(f"routing_path:folder={tmp_path / 'p'}")
    assert (settings.needs_trace, again.needs_trace) == (True, False)
    tokens, experts, x = np.array([3, 99]), routing(np.random.default_rng(0), 2), torch.zeros(2, D)
    assert all(map(same, walk(again.build(GEOMETRY), tokens, experts, x), walk(predictor, tokens, experts, x)))
    with pytest.raises(ConfigError, match="holds no routing path"):
        predictor.save(tmp_path)


def _edit(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | changes))


def _tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    save_file({**load_file(folder / TENSORS), name: value}, folder / TENSORS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / META).unlink(), "could not read"),
        (lambda folder: (folder / META).write_text("{"), "field 'file'"),
        (partial(_edit, kind="other"), "field 'kind'"),
        (partial(_edit, known_ids=10**12), "field 'known_ids'"),
        (partial(_edit, known_ids=3), "is not the predictor"),
        (partial(_edit, settings={"width": 1 << 30}), "width must be"),
        (partial(_edit, settings={"depth": 1}), "no setting 'depth'"),
        (partial(_edit, experts=[6, 8]), "was trained for"),
        (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:300]), "is not the predictor"),
        (partial(_tensor, name="head.bias", value=torch.full((21,), torch.nan)), "head.bias holds"),
        (partial(_tensor, name="ids", value=torch.zeros(9, dtype=torch.int64)), "ids holds"),
    ],
)
def test_a_damaged_predictor_is_refused(tmp_path: Path, trace: Trace, damage: Any, message: str) -> None:
    settings = find_predictor(SMALL)
    assert isinstance(settings, RoutingPath)
    settings.fit(GEOMETRY, Rows.of(trace)).save(tmp_path / "p")
    damage(tmp_path / "p")
    with pytest.raises(CheckpointError, match=message):
        RoutingPathPredictor.load(tmp_path / "p", GEOMETRY)
