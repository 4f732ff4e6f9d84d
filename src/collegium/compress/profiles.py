"""`Profiles`: which experts each of several tasks uses, in a few kilobytes a task, and how to find a task by a text.

PreMoe (2025, arXiv 2505.17639). A profile has two parts: in what order the experts of every layer matter to the task,
and a key, by which a text is recognised as one of the task. Finding a profile costs a small part of one forward: the
embedding, the layers before the first MoE layer, and that layer's router.

One safetensors file, which anything that loads experts on demand may read:

    rank   [N, L, E]   int16     place of each expert in its layer for the task, 0 for the one that matters most;
                                 layers are those of the meta, in its order; -1 beyond the experts of a smaller layer
    key    [N, E1]     float32   the task's mean over tokens of a router logit where it is among the token's `slots`
                                 largest and has at least `share` of the softmax over those, else 0; first MoE layer
    __metadata__["collegium"]    `ProfilesMeta` as JSON; __metadata__["checksum"], CRC-32 of that and of the tensors

The best M experts of a layer are those with a rank below M. Super experts, where the statistics tell them, come first
in every task.

Legend: N tasks, L MoE layers, E the most experts of a layer, E1 those of the first, T tokens, S tokens of a prompt.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from collegium._version import __version__
from collegium.catalog import method
from collegium.compress.collectors import RouterSums
from collegium.compress.importance import find_importance
from collegium.compress.mask import apply_mask
from collegium.compress.plan import LayerPlan, Plan
from collegium.compress.planners import Uniform
from collegium.compress.planners.scores import LayerScores, layer_scores
from collegium.compress.profiles_meta import ProfilesMeta
from collegium.compress.profiles_probe import text_key
from collegium.compress.target import Target
from collegium.data import Corpus, document_batches, encode_texts
from collegium.data.document import Split
from collegium.errors import ConfigError, DataError, StatisticsError
from collegium.files import atomic_file
from collegium.measure.statistics import Statistics
from collegium.measure.super_experts import super_experts

__all__ = ["Distance", "Match", "Profiles", "ProfilesMeta", "Retrieval", "profile_mask", "retrieval"]

Distance = Literal["l2", "cosine"]
"""Between keys. "l2", the paper's, also weighs how large logits are; "cosine" only which experts they are of."""

PROMPT = 2048
"""Tokens of a text that are looked at, from its beginning."""

_LIMIT = 1 << 30  # bytes


@dataclass(frozen=True, eq=False)
class Match:
    """What a text was found to be like.

    Attributes:
        task: the nearest.
        distances: every task with its distance, nearest first.
        tokens: how many were looked at.
        key: ``[E1]`` float32, the text's own.
    """

    task: str
    distances: tuple[tuple[str, float], ...]
    tokens: int
    key: Tensor


@method("premoe", kind="retrieval", paper="PreMoe (2025)", arxiv="2505.17639")
class Profiles:
    """The profiles of several tasks for one model.

    Attributes:
        meta: what they are of.
        rank, key: see the module.

    Raises:
        StatisticsError: a tensor is not what the meta asks for.
    """

    def __init__(self, meta: ProfilesMeta, rank: Tensor, key: Tensor) -> None:
        self.meta, self.rank, self.key = meta, rank, key
        sizes = [layer.num_experts for layer in meta.layers]
        wanted = {
            "rank": (rank, (len(meta.tasks), len(sizes), max(sizes)), torch.int16),
            "key": (key, (len(meta.tasks), sizes[0]), torch.float32),
        }
        for name, (tensor, shape, dtype) in wanted.items():
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise StatisticsError(f"{name!r} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
        if not bool(key.isfinite().all()):
            raise StatisticsError("'key' holds NaN or infinity")
        for place, (layer, E) in enumerate(zip(meta.layers, sizes, strict=True)):
            ranks = torch.cat([torch.full((max(sizes) - E,), -1), torch.arange(E)]).to(torch.int16)
            if not bool((rank[:, place].sort(dim=1).values == ranks).all() and (rank[:, place, :E] >= 0).all()):
                raise StatisticsError(f"'rank' of layer {layer.layer} does not give each of {E} experts its own place")

    @classmethod
    def from_statistics(cls, statistics: Statistics, target: Target, *, importance: str = "tcess") -> Profiles:
        """A profile of every domain.

        Args:
            statistics: with ``z_topk_sum``, and with what `importance` needs.
            target: the model they are of.
            importance: what ranks are by. The paper's own score looks at router logits only.

        Raises:
            ConfigError: they are of another model or lack something, or a domain has no tokens.
        """
        _check_same(statistics, target)
        score = find_importance(importance)
        settings = statistics.meta.collectors.get(RouterSums.name, {})
        sizes, domains = [layer.num_experts for layer in target.layers], statistics.meta.domains
        first = target.layers[0].layer
        supers: dict[int, set[int]] = {}
        if any(entry.name == "down_max" for entry in statistics.meta.statistics):
            for one in super_experts(statistics).found:
                supers.setdefault(one.layer, set()).add(one.expert)
        rank = torch.full((len(domains), len(sizes), max(sizes)), -1, dtype=torch.int16)
        keys, tokens = [], []
        for number, domain in enumerate(domains):
            for place, layer in enumerate(target.layers):
                order = layer_scores(statistics, layer.layer, score, domains=[domain]).order
                above = [e for e in order if e in supers.get(layer.layer, ())]
                order = (*above, *(e for e in order if e not in above))
                rank[number, place, list(order)] = torch.arange(len(order), dtype=torch.int16)
            tokens.append(int(statistics.get(first, "n_tokens", domain)))
            keys.append(statistics.get(first, "z_topk_sum", domain) / max(1, tokens[-1]))
        meta = ProfilesMeta.of(
            target,
            tasks=domains,
            tokens=tuple(tokens),
            importance=importance,
            slots=settings.get("slots") or target.top_k,
            share=settings.get("share", 0.0),
            data=statistics.meta.data,
        )
        return cls(meta, rank, torch.stack(keys).float())

    def add(self, other: Profiles) -> Profiles:
        """Both; neither is changed.

        Raises:
            ConfigError: they are of different models or were made differently, or have a task of one name.
        """
        fields = ("fingerprint", "family", "top_k", "groups", "top_groups", "layers", "importance", "slots", "share")
        for field in fields:
            mine, theirs = getattr(self.meta, field), getattr(other.meta, field)
            if mine != theirs:
                raise ConfigError(f"cannot add profiles whose {field} differs: {mine!r} and {theirs!r}")
        if twice := set(self.meta.tasks) & set(other.meta.tasks):
            raise ConfigError(f"both have a task {min(twice)!r}")
        added = {name: getattr(self.meta, name) + getattr(other.meta, name) for name in ("tasks", "tokens", "data")}
        rank, key = torch.cat([self.rank, other.rank]), torch.cat([self.key, other.key])
        return Profiles(self.meta.model_copy(update=added), rank, key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Raises StorageError if that cannot be done; what was there before is then untouched."""
        text = self.meta.model_dump_json()
        tensors = {"rank": self.rank.contiguous(), "key": self.key.contiguous()}
        metadata = {"collegium": text, "checksum": _checksum(text, tensors)}
        with atomic_file(path) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profiles:
        """Read what `save` wrote. Nothing in it is trusted.

        Raises:
            StatisticsError: it is no such file, or it is damaged or of another schema; the field is named.
        """
        path = Path(path)
        try:
            if path.stat().st_size > _LIMIT:
                raise StatisticsError(f"{path} is over the limit of {_LIMIT} bytes")
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except StatisticsError:
            raise
        except Exception as error:  # foreign bytes; what their parser raises is not ours to list
            raise StatisticsError(f"{path} holds no profiles: {error}") from error
        text = metadata.get("collegium", "")
        if not text or tensors.keys() != {"rank", "key"}:
            raise StatisticsError(f"{path} holds no profiles: it is another safetensors file")
        if metadata.get("checksum") != _checksum(text, tensors):
            raise StatisticsError(f"{path}: field 'checksum' does not fit the file; it is damaged or was changed")
        try:
            return cls(ProfilesMeta.model_validate_json(text), tensors["rank"], tensors["key"])
        except ValidationError as error:
            one = error.errors(include_url=False)[0]
            field = ".".join(map(str, one["loc"])) or "meta"
            raise StatisticsError(f"{path}: field {field!r}: {one['msg'].removeprefix('Value error, ')}") from error
        except StatisticsError as error:
            raise StatisticsError(f"{path}: {error}") from error

    def query(self, model: nn.Module, tokenizer: Any, prompt: str, *, distance: Distance = "l2") -> Match:
        """The task that a text is most like.

        Args:
            model, tokenizer: those the profiles are of.
            prompt: its first `PROMPT` tokens are looked at.

        Raises:
            ConfigError: it has no token, or there is no such distance.
            ModelError: it is another model.
        """
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = [*start, *encode_texts(tokenizer, [prompt])[0]][:PROMPT]
        if len(ids) == len(start):
            raise ConfigError("the text is empty; give one to look for")
        return self.nearest(text_key(model, self.meta, torch.tensor(ids)), len(ids), distance=distance)

    def nearest(self, key: Tensor, tokens: int, *, distance: Distance = "l2") -> Match:
        """The task whose key is nearest to ``key [E1]``, that of a text of so many tokens."""
        if distance not in get_args(Distance):
            raise ConfigError(f"distance {distance!r} is none of {', '.join(get_args(Distance))}")
        if distance == "l2":
            far = (self.key.double() - key.double()).norm(dim=1)
        else:
            far = 1 - torch.cosine_similarity(self.key.double(), key.double()[None], dim=1)
        pairs = sorted(zip(self.meta.tasks, far.tolist(), strict=True), key=lambda pair: pair[1])
        return Match(pairs[0][0], tuple(pairs), tokens, key)

    def plan_for(self, task: str, keep: float = 0.5) -> Plan:
        """A plan that keeps the same share of the experts in every layer, those that matter most to `task`.

        Raises:
            ConfigError: there is no such task, or the share leaves a router with too few experts.
        """
        if task not in self.meta.tasks:
            raise ConfigError(f"no task is named {task!r}; there are {', '.join(self.meta.tasks)}")
        rank, target, planner = self.rank[self.meta.tasks.index(task)], self.meta.target, Uniform(keep)
        scores = []
        for place, layer in enumerate(target.layers):
            E = layer.num_experts
            order = tuple(rank[place, :E].argsort().tolist())
            scores.append(LayerScores(layer.layer, torch.zeros(E), order, torch.zeros(E, dtype=torch.int64)))
        choice = planner.choose(scores, target, {})
        return Plan(
            model=target.model,
            fingerprint=target.fingerprint,
            family=target.family,
            method=self.meta.importance,
            settings={"profile": task},
            planner=planner.name,
            planner_settings={"keep": keep},
            data=self.meta.data,
            domains=(task,),
            asked=planner.asked,
            top_k=target.top_k,
            groups=target.groups,
            top_groups=target.top_groups,
            nbytes=target.nbytes,
            parameters=target.parameters,
            layers=tuple(
                LayerPlan(
                    layer=layer.layer,
                    op="identity" if len(choice[layer.layer]) == layer.num_experts else "prune",
                    num_experts=layer.num_experts,
                    keep=choice[layer.layer],
                    expert_nbytes=layer.expert_nbytes,
                    expert_parameters=layer.expert_parameters,
                )
                for layer in target.layers
            ),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            collegium=__version__,
        )


@contextmanager
def profile_mask(model: nn.Module, profiles: Profiles, task: str, keep: float = 0.5) -> Iterator[None]:
    """While open, `model` chooses among the experts that matter most to `task` only.

    Raises:
        ConfigError, PlanError, UnsupportedFamilyError: see `Profiles.plan_for` and `apply_mask`.
    """
    with apply_mask(model, profiles.plan_for(task, keep)):
        yield


@dataclass(frozen=True)
class Retrieval:
    """How often the right task is found.

    Attributes:
        accuracy: share of the prompts.
        prompts: how many there were.
        found: task -> what its prompts were taken for -> how often.
    """

    accuracy: float
    prompts: int
    found: Mapping[str, Mapping[str, int]]


def retrieval(
    profiles: Profiles,
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    *,
    split: Split = "valid",
    length: int = 64,
    prompts: int = 50,
    distance: Distance = "l2",
) -> Retrieval:
    """Look up prompts of documents whose domain is known.

    Args:
        corpus: its domains that are tasks count.
        split: which the profiles were not made from.
        length: S, tokens of a prompt; pieces of documents that are shorter do not count.
        prompts: of each domain, about.

    Raises:
        DataError: no document is as long.
    """
    found: dict[str, dict[str, int]] = {}
    budget = prompts * length * len(corpus.domains)
    batches = document_batches(corpus, tokenizer, split, sequence_length=length, batch_size=1, max_tokens=budget)
    for batch in batches:
        ids, domain = batch["input_ids"][0], corpus.domains[int(batch["domain"][0])]
        if len(ids) == length and domain in profiles.meta.tasks:
            task = profiles.nearest(text_key(model, profiles.meta, ids), length, distance=distance).task
            counts = found.setdefault(domain, {})
            counts[task] = counts.get(task, 0) + 1
    total = sum(sum(counts.values()) for counts in found.values())
    if not total:
        raise DataError(f"{corpus.name} has no document of {length} tokens in the split {split!r} of any known task")
    return Retrieval(sum(counts.get(name, 0) for name, counts in found.items()) / total, total, found)


def _check_same(statistics: Statistics, target: Target) -> None:
    meta = statistics.meta
    layers = [(one.layer, one.num_experts) for one in target.layers]
    known = meta.fingerprint is not None and target.fingerprint is not None
    if [(one.layer, one.num_experts) for one in meta.layers] != layers or (
        known and meta.fingerprint != target.fingerprint
    ):
        raise ConfigError(
            f"the statistics are of {meta.model} with fingerprint {meta.fingerprint}; {target.model} has "
            f"{target.fingerprint}: calibrate this model"
        )


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    value = zlib.crc32(text.encode())
    for name in ("rank", "key"):
        # as bytes: a foreign file may hold dtypes that numpy lacks
        value = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
