from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from collegium.errors import DataError
from collegium.train import Recipe, build_model, evaluate
from collegium.train.evaluate import Evaluation
from collegium.train.prepare import Prepared, prepare
from collegium.train.ranks import Ranks

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def data(settings: Callable[..., dict[str, object]]) -> Prepared:
    return prepare(Recipe.parse(settings()), Ranks())


def test_bits_per_byte_count_each_predicted_token_and_its_bytes_once(recipe: Make, data: Prepared) -> None:
    model = build_model(recipe(), data.tokenizer)
    found = evaluate(model, data.valid, data.token_bytes, batch_size=3, mask_documents=False)
    assert model.training
    model.eval()
    nats, sizes = {"count": 0.0, "song": 0.0}, {"count": 0, "song": 0}
    for row in range(len(data.valid)):
        batch = data.valid.batch([row])
        domain = data.valid.domains[int(batch["domain"][0, 0])]
        ids = batch["input_ids"]
        with torch.no_grad():
            logs = model(input_ids=ids).logits.double().log_softmax(-1)
        for place in range(1, ids.shape[1]):
            token = int(ids[0, place])
            nats[domain] -= float(logs[0, place - 1, token])
            # independent of token_bytes: what the token decodes to, where that is whole characters
            text = data.tokenizer.decode([token])
            size = 0 if token == data.tokenizer.eos_token_id else len(text.encode())
            sizes[domain] += size if "\ufffd" not in text else 1
    assert found.bytes == sizes
    assert found.tokens == {name: sum(_rows(data, name)) * 31 for name in sizes}
    for name, value in found.bits_per_byte.items():
        assert value == pytest.approx(nats[name] / math.log(2) / sizes[name], rel=1e-5)
    assert found.overall == pytest.approx(sum(nats.values()) / math.log(2) / sum(sizes.values()), rel=1e-5)


def _rows(data: Prepared, domain: str) -> list[bool]:
    first = np.asarray(data.valid.document[:, 0])
    return [data.valid.domains[d] == domain for d in data.valid.domain_of_document[first]]


def test_batches_and_processes_do_not_change_the_result(recipe: Make, data: Prepared) -> None:
    model = build_model(recipe(), data.tokenizer)
    whole = evaluate(model, data.valid, data.token_bytes, batch_size=100)
    pieces = evaluate(model, data.valid, data.token_bytes, batch_size=1)
    # without a process group nothing is summed, so each call gives one process's share
    shares = [evaluate(model, data.valid, data.token_bytes, batch_size=2, ranks=Ranks(rank, 3)) for rank in range(3)]
    joint = Evaluation(
        {name: sum(s.nats.get(name, 0.0) for s in shares) for name in whole.nats},
        {name: sum(s.bytes.get(name, 0) for s in shares) for name in whole.nats},
        {name: sum(s.tokens.get(name, 0) for s in shares) for name in whole.nats},
    )
    for other in (pieces, joint):
        assert other.bytes == whole.bytes
        assert other.tokens == whole.tokens
        assert other.overall == pytest.approx(whole.overall, rel=1e-6)


def test_a_limit_takes_as_many_of_each_domain(recipe: Make, data: Prepared) -> None:
    model = build_model(recipe(), data.tokenizer)
    found = evaluate(model, data.valid, data.token_bytes, batch_size=4, sequences_per_domain=2)
    assert found.tokens == {"count": 2 * 31, "song": 2 * 31}


def test_nothing_to_score_is_an_error(recipe: Make, data: Prepared) -> None:
    model = build_model(recipe(), data.tokenizer)
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(model, data.valid, data.token_bytes, batch_size=4, sequences_per_domain=0)
