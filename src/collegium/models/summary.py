"""What a checkpoint is, from its config and headers alone: how many parameters, where they are, how many a token uses.

``summarize`` classifies every tensor by its name and counts. Where weights are missing, the same count runs over the
tensors that the config's model class would have (built on the meta device, so nothing is allocated), and the result
says that it is predicted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

from collegium.errors import CheckpointError, RemoteCodeError
from collegium.family_scores import family_score
from collegium.models.checkpoint import BITS, Checkpoint, TensorInfo, refuse_remote_code
from collegium.models.families import BIAS_IS_PARAMETER, TOP_K, lookup

__all__ = ["PARTS", "LayerSummary", "Summary", "layer_of", "part_of", "predict_tensors", "split_extra", "summarize"]

T = TypeVar("T")

PARTS = ("experts", "shared_experts", "router", "attention", "dense", "embedding", "other")
"""Parts of a model: routed experts, shared experts, routers (with their biases), token mixing (attention, state space,
convolution), dense feed-forward layers, embeddings and head, and the rest (norms, vision towers, ...)."""

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_EXPERT_ID = re.compile(r"experts\.(?:expert_)?(\d+)\.")
_MAIN_STACK = re.compile(r"(^|\.)(model|language_model|backbone)\.layers$|^layers$")
_TOWER = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|vit|multi_modal_projector|resampler_model)\.")
_SELECTION_BIAS = re.compile(r"e_score_correction_bias|expert_bias|balancing_biases|(^|\.)ffn\.gate\.bias$")
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("router", _SELECTION_BIAS),
    ("shared_experts", re.compile(r"shared_expert|share_expert|shared_mlp")),
    ("experts", re.compile(r"(^|\.)experts\.(?!(router|bias)(\.|$))|(mlp|block_sparse_moe)\.(input|output)_linear\.")),
    ("experts", re.compile(r"mlp\.(up|down)_embed\.")),  # Doge keeps its experts as rows of an embedding
    ("router", re.compile(r"^gate\.")),  # right in the layer (Mistral Large 4)
    ("router", re.compile(r"\.later_gates\.")),  # of our own layers that route several times
    ("router", re.compile(r"tid2eid|(^|\.)(router|router_gate)\.")),
    ("router", re.compile(r"(mlp|mlp\.\w+_moe|block_sparse_moe|feed_forward|mixer|ffn|moe)\.gate\.")),
    (
        "attention",
        re.compile(r"attn|attention|mamba|mixer\.(?!up_proj|down_proj)|(^|\.)conv\.|SelfAttention|temporal_block"),
    ),
    ("embedding", re.compile(r"embed|(^|\.)(wte|lm_head|shared)\.|^(model\.)?(head|output)\.")),
    ("dense", re.compile(r"(^|\.)(mlp|mlps|feed_forward|ffn|mixer|DenseReluDense|block_sparse_moe)\.")),
)
_NORM = re.compile(r"(norm\w*|ln_\w+)(\.\d+)?(\.weight|\.bias)?$")
# what quantisers store beside the weights: bytes, but no parameters
_OVERHEAD = re.compile(
    r"((weight|input)(_global)?_scale|weight_scale_inv|_scales|\.scales|\.g_idx|\.qzeros|_zero_point|weight_shape"
    r"|absmax|quant_map|quant_state\S*|\.SCB)$"
)
_PACKED = re.compile(r"(weight_packed|\.qweight|_blocks)$")
_BUFFERS = re.compile(r"(layer_scalar|embed_scale|slope_rate|_decay|running_mean|running_var|inv_freq)$")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class LayerSummary:
    """One MoE layer.

    Attributes:
        layer: index of the decoder layer; `stack` is the path of the list it is in.
        num_experts, top_k: E and K; None where neither headers nor config tell.
        expert_parameters: parameters of one expert (the mean, should they differ).
        parameters, active_parameters: of the whole layer with attention and norms; active are those one token uses.
        expert_nbytes, nbytes: stored bytes of one expert and of the whole layer.
    """

    stack: str
    layer: int
    num_experts: int | None
    top_k: int | None
    expert_parameters: int
    parameters: int
    active_parameters: int | None
    expert_nbytes: int
    nbytes: int


@dataclass(frozen=True)
class Summary:
    """A model in numbers.

    Attributes:
        source: what was counted: "headers"; "predicted", the model the config describes; or "partial", only the shards
            that are there, of a family that cannot be predicted.
        score: "softmax", "sigmoid", ...; None for a family that is not known.
        expert_width: f, the width of one expert's hidden layer.
        parameters, active_parameters: totals; active ones are those a token uses (None if K is not known).
        extra_parameters: of layers beyond ``num_hidden_layers`` (multi-token prediction), not in the totals.
        parts: part -> (parameters, bytes), see `PARTS`.
        dtypes: dtype -> bytes.
        quantization: method named by the config, or None.
        missing: shards that are not there.
    """

    family: str
    architecture: str | None
    source: str
    num_layers: int
    moe_layers: tuple[LayerSummary, ...]
    shared_experts: int
    score: str | None
    expert_width: int | None
    parameters: int
    active_parameters: int | None
    extra_parameters: int
    nbytes: int
    parts: dict[str, tuple[int, int]]
    dtypes: dict[str, int]
    quantization: str | None
    missing: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The summary as plain data, for ``--json``."""
        return asdict(self)


def summarize(checkpoint: Checkpoint) -> Summary:
    """Count a checkpoint. Counts are exact where all shards are there, else they are predicted from the config.

    Raises:
        CheckpointError: there are no weights and the config is of no family transformers can build.
        RemoteCodeError: there are no weights and the model class would be code of the checkpoint.
    """
    config = checkpoint.config
    source, tensors = _tensors(checkpoint)
    if config.get("tie_word_embeddings") and any("embed_tokens" in name for name in tensors):
        tensors = {name: info for name, info in tensors.items() if name != "lm_head.weight"}
    family = _text_family(config)
    main, extra = split_extra(tensors, lookup(config, "layers"))
    counts = {name: _parameters(name, info, config, family) for name, info in tensors.items()}
    parts = dict.fromkeys(PARTS, (0, 0))
    dtypes: Counter[str] = Counter()
    for name, info in main.items():
        count, nbytes = parts[part_of(name)]
        parts[part_of(name)] = (count + counts[name], nbytes + info.nbytes)
        dtypes[info.dtype] += info.nbytes
    moe = _moe_layers(main, counts, config, family)
    total = sum(count for count, _ in parts.values())
    idle = [layer.parameters - layer.active_parameters for layer in moe if layer.active_parameters is not None]
    quantization = _table(config, "quantization_config")
    return Summary(
        family=str(config.get("model_type", "unknown")),
        architecture=_architecture(config),
        source=source,
        num_layers=len({key for name in main if (key := layer_of(name)) and not _TOWER.search(name)}),
        moe_layers=moe,
        shared_experts=_shared_experts(config, parts["shared_experts"][0]),
        score=_score(config, family) if moe else None,
        expert_width=_at(lookup(config, "expert_width"), 0) if moe else None,
        parameters=total,
        active_parameters=total - sum(idle) if len(idle) == len(moe) else None,
        extra_parameters=sum(counts[name] for name in extra),
        nbytes=sum(dtypes.values()),
        parts=parts,
        dtypes=dict(dtypes.most_common()),
        quantization=str(quantization.get("quant_method", "unnamed")) if quantization else None,
        missing=tuple(sorted(checkpoint.missing)),
    )


@lru_cache(maxsize=1 << 17)
def part_of(name: str) -> str:
    """The part of the model (one of `PARTS`) that the tensor `name` belongs to, on disk or in memory."""
    if _TOWER.search(name) or _NORM.search(name):
        return "other"
    layer = _LAYER.search(name)
    rest = name[layer.end() :] if layer else name
    return next((part for part, rule in _RULES if rule.search(rest)), "other")


def predict_tensors(config: dict[str, Any]) -> dict[str, TensorInfo]:
    """The parameters a model of this raw config has, with transformers' in-memory names; nothing is allocated.

    Raises:
        CheckpointError: transformers cannot build such a model.
        RemoteCodeError: the model class would be code that came with the checkpoint.
    """
    refuse_remote_code(config)
    try:
        model = _build(config)
    except Exception as error:  # a foreign config can fail anywhere in its model class
        raise CheckpointError(
            f"cannot predict a model of type {config.get('model_type')!r} from its config: {error}"
        ) from error
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "F32")
    return {
        name: TensorInfo("", dtype, tuple(p.shape), 0, p.numel() * BITS[dtype] // 8)
        for name, p in model.named_parameters()
    }


def _build(config: dict[str, Any]) -> Any:
    """The model of a raw config on the meta device."""
    import torch
    import transformers

    own = _table(config, "collegium")
    family = own.get("base") or str(config.get("model_type"))
    skip = ("model_type", "auto_map", "collegium", "quantization_config")
    resolved = transformers.AutoConfig.for_model(family, **{k: v for k, v in config.items() if k not in skip})
    named = getattr(transformers, _architecture(config) or "", None)
    with torch.device("meta"):
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            model = named(resolved)
        elif type(resolved) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            model = transformers.AutoModelForCausalLM.from_config(resolved)
        else:
            model = transformers.AutoModel.from_config(resolved)
        if own.get("moe") is not None:
            from collegium.models import MoEConfig, install

            install(model, MoEConfig.model_validate(own["moe"]), layers=own["layers"])
    return model


def _tensors(checkpoint: Checkpoint) -> tuple[str, dict[str, TensorInfo]]:
    """``(source, tensors to count)``."""
    if checkpoint.tensors and not checkpoint.missing:
        return "headers", checkpoint.tensors
    try:
        return "predicted", predict_tensors(checkpoint.config)
    except (CheckpointError, RemoteCodeError):
        if not checkpoint.tensors:
            raise
        return "partial", checkpoint.tensors


def _table(config: dict[str, Any], *path: str) -> dict[str, Any]:
    """The object at `path` of a raw config; empty if it is not there or no object."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _text_family(config: dict[str, Any]) -> str:
    base = _table(config, "collegium").get("base")  # of a folder in our own format
    return str(_table(config, "text_config").get("model_type") or base or config.get("model_type"))


def _score(config: dict[str, Any], family: str) -> str | None:
    named = lookup(config, "score")
    return named if isinstance(named, str) else family_score(family)


@lru_cache(maxsize=1 << 17)
def layer_of(name: str) -> tuple[str, int] | None:
    """``("model.layers", 3)`` of ``model.layers.3.mlp...``; None for a tensor of no layer."""
    match = _LAYER.search(name)
    return (name[: match.start()], int(match[1])) if match else None


def split_extra(tensors: Mapping[str, T], layers: object) -> tuple[dict[str, T], dict[str, T]]:
    """Split off the layers beyond ``num_hidden_layers``: multi-token prediction, which transformers does not load."""

    def is_extra(name: str) -> bool:
        key = layer_of(name)
        beyond = key is not None and isinstance(layers, int) and key[1] >= layers
        return name.startswith("mtp.") or (beyond and key is not None and bool(_MAIN_STACK.search(key[0])))

    extra = {name: info for name, info in tensors.items() if is_extra(name)}
    return {name: info for name, info in tensors.items() if name not in extra}, extra


def _parameters(name: str, info: TensorInfo, config: dict[str, Any], family: str) -> int:
    """How many parameters of the model a stored tensor stands for."""
    quantization = _table(config, "quantization_config")
    if _BUFFERS.search(name) or (quantization and _OVERHEAD.search(name)):
        return 0
    if _SELECTION_BIAS.search(name):
        return info.numel if family in BIAS_IS_PARAMETER else 0
    if _PACKED.search(name) or (info.dtype == "U8" and quantization.get("load_in_4bit")):
        bits = 4 if info.dtype == "U8" else _weight_bits(quantization)
        return info.numel * BITS[info.dtype] // bits
    # other whole numbers are tables (token -> expert, positions), not parameters
    return 0 if info.dtype in ("BOOL", "U8", "U16", "I16", "U32", "I32", "U64", "I64") else info.numel


def _weight_bits(quantization: dict[str, Any]) -> int:
    groups = _table(quantization, "config_groups")
    weights = _table(groups, next(iter(groups), ""), "weights")
    bits = quantization.get("bits") or weights.get("num_bits")
    return bits if isinstance(bits, int) and 1 <= bits <= 32 else 4


def _moe_layers(
    tensors: dict[str, TensorInfo], counts: dict[str, int], config: dict[str, Any], family: str
) -> tuple[LayerSummary, ...]:
    layers: dict[tuple[str, int], list[str]] = {}
    for name in tensors:
        if (key := layer_of(name)) is not None:
            layers.setdefault(key, []).append(name)
    found = []
    iterations = _at(_table(config, "collegium", "moe").get("iterations"), 0) or 1
    top_k = lookup(config, "top_k") or TOP_K.get(family) or _default_top_k(config)
    for (stack, layer), names in sorted(layers.items()):
        experts = [name for name in names if part_of(name) == "experts"]
        if not experts:
            continue
        E = _num_experts(experts, tensors, _at(lookup(config, "num_experts"), layer))
        K = _at(top_k, layer)
        own, whole = sum(counts[name] for name in experts), sum(counts[name] for name in names)
        nbytes = sum(tensors[name].nbytes for name in experts)
        active = whole - own * (E - min(K * iterations, E)) // E if E and K else None
        found.append(
            LayerSummary(
                stack,
                layer,
                E,
                K,
                own // (E or 1),
                whole,
                active,
                nbytes // (E or 1),
                sum(tensors[name].nbytes for name in names),
            )
        )
    return tuple(found)


def _num_experts(names: list[str], tensors: dict[str, TensorInfo], configured: int | None) -> int | None:
    """E of one layer: distinct expert ids, or the first axis of fused tensors; the config's where neither tells."""
    ids: dict[str, set[str]] = {}
    for name in names:
        if match := _EXPERT_ID.search(name):
            # by matrix, as quantisers may store the same matrix of two experts under different names
            ids.setdefault(name[match.end() :].partition(".")[0], set()).add(match[1])
    if ids:
        # the fewest, because LongCat also stores an up projection for experts that compute nothing
        return min(map(len, ids.values()))
    if any(".experts.mlp." in name for name in names):  # DBRX flattens [E, f] into one axis
        return configured
    return min((tensors[name].shape[0] for name in names if len(tensors[name].shape) > 2), default=configured)


def _shared_experts(config: dict[str, Any], parameters: int) -> int:
    count = _at(lookup(config, "shared"), 0)
    return (count or 1) if parameters else 0


def _at(value: Any, layer: int) -> int | None:
    """The entry of a setting that may be one number or a list with one per layer."""
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    return value if type(value) is int else None


def _default_top_k(config: dict[str, Any]) -> Any:
    """K that the family's config class has by default, for a hand-written config that leaves it out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = str(config.get("model_type"))
    return lookup(CONFIG_MAPPING[family]().to_dict(), "top_k") if family in CONFIG_MAPPING else None
