"""`judge`: against plain transformers, against what is known by hand, and against the checkpoint that a plan makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from judging import TEXTS, VOCABULARY, byte_tokenizer, made_up_corpus

from collegium.compress import apply_plan
from collegium.compress.judge import judge
from collegium.compress.judge_maps import expert_maps
from collegium.compress.judge_result import Judgement
from collegium.compress.plan import LayerPlan, Operator, Plan
from collegium.data import encode_texts
from collegium.errors import ConfigError, DataError, NonFiniteError, PlanError
from collegium.models.checkpoint import open_checkpoint
from collegium.models.folder import load
from pruning import plan_of, saved
from tiny import families, tiny_model

SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 256}


def found_for(model: Any, **options: Any) -> Judgement:
    settings = {"new_tokens": 0, "batch_size": 3} | options
    return judge(model, byte_tokenizer(), made_up_corpus(), **settings)


def model_of(seed: int = 0, family: str = "qwen3_moe") -> Any:
    return tiny_model(family, seed=seed, **SIZES)


@torch.no_grad()
def log_probabilities(model: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the next token at each place of one text, and the tokens."""
    ids = torch.tensor([[0, *encode_texts(byte_tokenizer(), [text])[0]]])
    return model(input_ids=ids).logits[0, :-1].log_softmax(-1), ids[0, 1:]


def test_losses_are_those_of_plain_transformers() -> None:
    model = model_of()
    found = found_for(model)
    assert found.whole is None
    assert found.layers == ()
    assert [one.domain for one in found.domains] == sorted(TEXTS)
    every, nats = 0.0, 0.0
    for one in found.domains:
        sums, count = 0.0, 0
        for text in TEXTS[one.domain]:
            log, target = log_probabilities(model, text)
            sums -= float(log.gather(1, target[:, None]).sum())
            count += len(target)
        assert (one.documents, one.tokens, one.bytes) == (3, count, count), "a token is a byte"
        assert one.loss.value == pytest.approx(sums / count, rel=1e-5)
        assert one.perplexity == pytest.approx(math.exp(sums / count), rel=1e-4)
        assert one.bits_per_byte == pytest.approx(sums / count / math.log(2), rel=1e-5)
        assert one.loss.low < one.loss.value < one.loss.high
        every, nats = every + count, nats + sums
    assert found.overall.loss.value == pytest.approx(nats / every, rel=1e-5)


def test_kl_and_top1_are_those_of_the_two_distributions() -> None:
    model, whole = model_of(0), model_of(1)
    found = found_for(model, against=whole)
    for one in found.domains:
        kl, same, count = 0.0, 0, 0
        for text in TEXTS[one.domain]:
            q, p = log_probabilities(model, text)[0], log_probabilities(whole, text)[0]
            kl += float((p.exp() * (p - q)).sum())
            same += int((p.argmax(1) == q.argmax(1)).sum())
            count += len(p)
        assert one.kl is not None
        assert one.top1 is not None
        assert one.difference is not None
        assert one.kl.value == pytest.approx(kl / count, rel=1e-4)
        assert one.top1.value == same / count
        assert one.difference.value == pytest.approx(one.loss.value - one.whole_loss, abs=1e-9)
    assert found.whole_proxies["loss/mean"] == pytest.approx(found.overall.whole_loss)


@pytest.mark.parametrize("family", families("qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"))
def test_a_model_is_like_itself(family: str) -> None:
    model = model_of(family=family)
    found = found_for(model, against=model)
    assert found.overall.kl is not None
    assert found.overall.kl.value == 0
    assert found.overall.top1 is not None
    assert found.overall.top1.value == 1
    assert found.layers
    for layer in found.layers:
        assert layer.present is not None
        assert layer.agreement is not None
        assert layer.output_error is not None
        assert (layer.present.value, layer.agreement.value, layer.output_error.value) == (1, 1, 0)
    assert found.proxies == found.whole_proxies


def test_a_plan_as_a_mask_is_the_checkpoint_it_makes(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen3_moe", **SIZES)
    plan = plan_of(folder)
    apply_plan(plan, folder, tmp_path / "small")
    whole, small = load(folder), load(tmp_path / "small")
    predicted = found_for(whole, against=whole, plan=plan)
    maps = expert_maps(open_checkpoint(tmp_path / "small"), open_checkpoint(folder))
    measured = found_for(small, against=whole, maps=maps)
    assert predicted.masked
    assert not measured.masked
    for a, b in zip((predicted.overall, *predicted.domains), (measured.overall, *measured.domains), strict=True):
        assert a.loss.value == pytest.approx(b.loss.value, abs=1e-5)
        assert a.loss.value != pytest.approx(a.whole_loss, abs=1e-3), "the mask does something"
        assert (a.kl.value, a.top1.value) == pytest.approx((b.kl.value, b.top1.value), abs=1e-4)
    for a, b in zip(predicted.layers, measured.layers, strict=True):
        assert (a.num_experts, b.num_experts, b.whole_experts) == (8, 4, 8)
        assert 0 < a.present.value < 1
        for name in ("present", "agreement", "output_error"):
            assert getattr(a, name).value == pytest.approx(getattr(b, name).value, abs=1e-5)
    assert found_for(whole).overall.loss.value == pytest.approx(predicted.overall.whole_loss), "the mask is gone"


def test_the_first_layer_chooses_what_is_left_of_the_original_choice() -> None:
    """Nothing before it differs, so of two choices those that are still there are made again."""
    model = model_of()
    first = found_for(model, against=model, plan=_keep_half(model)).layers[0]
    assert first.agreement is not None
    assert first.agreement.value == 1


def _keep_half(model: Any) -> Plan:
    from shrinking import made_up_plan

    return made_up_plan([range(4)] * model.config.num_hidden_layers)


def test_generation_is_greedy_and_by_both() -> None:
    model, whole = model_of(0), model_of(1)
    whole.generation_config.do_sample, whole.generation_config.temperature = True, 5.0
    found = found_for(model, against=whole, new_tokens=5)
    assert [one.domain for one in found.continuations] == sorted(TEXTS)
    for one in found.continuations:
        assert TEXTS[one.domain][0].startswith(one.prompt)
        ids = torch.tensor([[0, *encode_texts(byte_tokenizer(), [one.prompt])[0]]])
        for side, text in ((model, one.text), (whole, one.whole_text)):
            expected = side.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=1
            )
            assert text == byte_tokenizer().decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_dense_model_has_no_layers() -> None:
    dense = tiny_model("qwen3", **SIZES)
    found = found_for(dense, against=model_of())
    assert found.layers == ()
    assert found.overall.kl is not None


def test_routers_of_unrelated_models_are_not_compared() -> None:
    found = found_for(model_of(), against=tiny_model("qwen3_moe", num_local_experts=16, **SIZES))
    assert found.layers[0].agreement is None
    assert found.layers[0].output_error is not None
    assert any("routers are not compared" in note for note in found.notes)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    found = found_for(model_of(0), against=model_of(1), new_tokens=2)
    found.save(tmp_path / "found.json")
    assert Judgement.load(tmp_path / "found.json") == found
    assert Judgement.load(tmp_path / "found.json").record()["overall"]["bits_per_byte"] == found.overall.bits_per_byte
    (tmp_path / "found.json").write_text("{}")
    with pytest.raises(DataError, match=r"found\.json"):
        Judgement.load(tmp_path / "found.json")


def test_one_document_has_no_interval(tmp_path: Path) -> None:
    corpus = made_up_corpus({"prose": ("one text",)})
    found = judge(model_of(), byte_tokenizer(), corpus, new_tokens=0)
    assert math.isnan(found.overall.loss.low)
    found.save(tmp_path / "found.json")
    assert math.isnan(Judgement.load(tmp_path / "found.json").overall.loss.low)


def test_training_goes_on_as_before() -> None:
    model = model_of().train()
    found_for(model)
    assert model.training


def test_bad_input_is_refused() -> None:
    model = model_of()
    with pytest.raises(DataError, match="the train split of the corpus made up has no text"):
        found_for(model, split="train")
    with pytest.raises(ConfigError, match="258 and 300 tokens"):
        found_for(model, against=tiny_model("qwen3_moe", vocab_size=300))
    with pytest.raises(ConfigError, match="do not belong together"):
        found_for(tiny_model("qwen3_moe"))
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(NonFiniteError, match="predicts NaN"):
        found_for(model)


def test_computed_experts_cannot_be_masked() -> None:
    model = model_of()
    record = _keep_half(model).model_dump()
    groups = ((0, 4), (1, 5), (2, 6), (3, 7))
    merged = [
        LayerPlan(**{**layer, "op": "merge", "groups": groups, "weights": ((0.5, 0.5),) * 4})
        for layer in record["layers"]
    ]
    plan = Plan(**{**record, "layers": tuple(merged), "operator": Operator(name="average")})
    with pytest.raises(PlanError, match="cannot be tried as a mask"):
        found_for(model, against=model, plan=plan)
