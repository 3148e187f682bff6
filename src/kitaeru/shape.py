"""What a config.json says of a model: enough to count its parameters and to plan, without weights and without torch.

A shape lists the model's linear layers with what each reads (`Linear.reads`), so that the planner can say what is
stored, what is trained and what is kept for the backward pass, layer by layer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import ModelError
from kitaeru.i18n import tr

Reads = Literal["attention_in", "attention_out", "mlp_in", "mlp_mid", "hidden"]
NormKind = Literal["rms", "rms_offset", "layer"]


@dataclass(frozen=True)
class Linear:
    """`count` linear layers of one name in the whole model; weight [outputs, inputs].

    `reads` names the tensor it takes; layers that read the same one can share what is kept of it.
    """

    name: str
    inputs: int
    outputs: int
    count: int
    bias: bool
    reads: Reads

    @property
    def weights(self) -> int:
        """Weights of one such layer, its bias left out."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model. `family` is transformers' model_type.

    `sliding_layers` is how many layers see only `sliding_window` tokens back. `experts` 0 means a dense MLP;
    `dense_layers` counts the layers of a mixture that have a dense MLP all the same. With `parallel_residual`
    attention and MLP read the same stream; `rotary_share` is the part of a head that is rotated. `exact` is False for
    a family whose parts are not known here: it is then counted as a Llama of these sizes.
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    max_position: int = 0
    sliding_window: int = 0
    sliding_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_expert_intermediate: int = 0
    dense_layers: int = 0
    expert_bias: bool = False
    router_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "full"] = ""
    norm: NormKind = "rms"
    norm_bias: bool = False
    norms_per_layer: int = 2
    gated_mlp: bool = True
    fused_qkv: str = ""
    fused_gate_up: str = ""
    names: tuple[str, str, str] = ("o_proj", "up_proj", "down_proj")
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    attention_dropout: float = 0.0
    sinks: bool = False
    learned_positions: int = 0
    rotary_share: float = 1.0
    parallel_residual: bool = False
    head_bias: bool = False
    exact: bool = True
    name: str = ""

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or value heads) together."""
        return self.kv_heads * self.head_dim

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @property
    def packed_causal(self) -> bool:
        """Whether every layer is causal attention that kitaeru's packed kernels compute, with windows or soft-capped
        scores or without.
        """
        return not (self.sinks or self.attention_dropout)

    @property
    def sandwiched(self) -> bool:
        """Whether what attention and MLP add to the stream is normed before."""
        return self.norms_per_layer == 4

    def linears(self) -> tuple[Linear, ...]:
        """The linear layers inside the blocks: those that adapters and quantisation work on. The head is not one."""
        return self._linears

    @cached_property
    def _linears(self) -> tuple[Linear, ...]:
        return _attention_linears(self) + _mlp_linears(self)

    def parameters(self) -> int:
        """All parameters, tied ones once.

        >>> ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256).parameters()
        8030261248
        """
        return (
            self.linear_parameters() + self.expert_parameters() + self.embedding_parameters() + self.small_parameters()
        )

    def linear_parameters(self) -> int:
        """Weights of the linear layers inside the blocks, without biases: what quantisation shrinks."""
        return self._linear_parameters

    @cached_property
    def _linear_parameters(self) -> int:
        return sum(linear.weights * linear.count for linear in self.linears())

    def expert_parameters(self) -> int:
        """Weights of all experts, which transformers keeps as stacked tensors that are no linear layers."""
        per_expert = (3 if self.gated_mlp else 2) * self.hidden * self.expert_intermediate
        return (self.layers - self.dense_layers) * self.experts * per_expert

    def embedding_parameters(self) -> int:
        """Weights of the input embedding and the output head, counted once when they are tied."""
        tables = (1 if self.tied else 2) * self.vocab * self.hidden
        return tables + self.learned_positions * self.hidden + (self.vocab if self.head_bias else 0)

    def small_parameters(self) -> int:
        """Norms, biases, routers and attention sinks."""
        return self._small_parameters

    @cached_property
    def _small_parameters(self) -> int:
        width = 2 if self.norm_bias else 1
        norms = width * self.hidden * (self.norms_per_layer * self.layers + 1)
        if self.qk_norm == "head":
            norms += 2 * self.head_dim * self.layers
        elif self.qk_norm == "full":
            norms += (self.q_size + self.kv_size) * self.layers
        biases = sum(linear.outputs * linear.count for linear in self.linears() if linear.bias)
        mixtures = (self.layers - self.dense_layers) if self.experts else 0
        routers = mixtures * self.experts * (self.hidden + (1 if self.router_bias else 0))
        if self.shared_expert_intermediate:
            routers += mixtures * self.hidden
        if self.expert_bias:
            biases += mixtures * self.experts * (2 * self.expert_intermediate + self.hidden)
        return norms + biases + routers + (self.heads * self.layers if self.sinks else 0)

    def active_parameters(self) -> int:
        """Block weights that one token meets: the `N` of "2 N FLOP per token"."""
        active = self.expert_parameters() * self.experts_per_token // self.experts if self.experts else 0
        return self.linear_parameters() + active

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "") -> ModelShape:
        """The shape a transformers config.json describes (its text part, for a model that also sees or hears).

        Raises:
            ModelError: a size is missing, or the model is no causal transformer this planner understands.
        """
        return _from_config(dict(config), name)

    @classmethod
    def from_folder(cls, path: Path) -> ModelShape:
        """The shape of the model in a folder, or of a config.json named itself.

        Raises:
            ModelError: there is no readable config.json, or it lacks a size.
        """
        file = path if path.suffix == ".json" else path / "config.json"
        try:
            config: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(
                tr("{path} cannot be read as a model's config.json.", path=file),
                remedy=tr("Name a folder with a model in the transformers format, or a Hub id."),
            ) from error
        if not isinstance(config, dict):
            raise ModelError(tr("{path} is not a model's config.json.", path=file))
        return cls.from_config(config, name=str(path))

    @classmethod
    def from_catalogue(cls, name: str) -> ModelShape | None:
        """The shape of a known Hub id (upper or lower case); None when the catalogue does not have it."""
        entry = _by_name().get(name.lower())
        return cls.from_config(entry.config, name=entry.name) if entry else None


def find_shape(name: str) -> ModelShape:
    """The shape of a model by what a person calls it: `bundled`, a folder or config.json, a known Hub id, or a Hub id
    that was downloaded before.

    Raises:
        ModelError: it is none of these; the remedy names models like it.
    """
    if name == "bundled":
        return replace(ModelShape.from_folder(Path(__file__).parent / "assets" / "bundled"), name=name)
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        return ModelShape.from_folder(path)
    known = ModelShape.from_catalogue(name)
    if known is not None:
        return known
    cached = _downloaded(name)
    if cached is not None:
        return replace(ModelShape.from_folder(cached), name=name)
    words = {word for word in re.split(r"[^a-z0-9]+", name.lower().rpartition("/")[2]) if len(word) > 2}
    alike = [entry.name for entry in catalogue() if any(word in entry.name.lower() for word in words)]
    raise ModelError(
        tr("{model} is neither a folder nor a model whose sizes are known here.", model=name),
        remedy=tr(
            "Names like it: {names}. Or name a folder with its config.json; `kitaeru models` lists all known models.",
            names=", ".join(alike[:5]) or "bundled",
        ),
    )


def _downloaded(name: str) -> Path | None:
    """The config.json of a Hub id in the Hub's cache on this machine."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    found = sorted((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return found[-1] if found else None


def _attention_linears(s: ModelShape) -> tuple[Linear, ...]:
    h, n = s.hidden, s.layers
    out = Linear(s.names[0], s.q_size, h, n, s.o_bias, "attention_out")
    if s.fused_qkv:
        return (Linear(s.fused_qkv, h, s.q_size + 2 * s.kv_size, n, s.qkv_bias, "attention_in"), out)
    sizes = (("q_proj", s.q_size), ("k_proj", s.kv_size), ("v_proj", s.kv_size))
    return (*(Linear(name, h, size, n, s.qkv_bias, "attention_in") for name, size in sizes), out)


def _mlp_linears(s: ModelShape) -> tuple[Linear, ...]:
    found: list[Linear] = []
    dense = s.layers if not s.experts else s.dense_layers
    for count, width in ((dense, s.intermediate), (s.layers - dense, s.shared_expert_intermediate)):
        if not count or not width:
            continue
        h = s.hidden
        if s.fused_gate_up:
            found.append(Linear(s.fused_gate_up, h, 2 * width, count, s.mlp_bias, "mlp_in"))
        elif s.gated_mlp:
            found.append(Linear("gate_proj", h, width, count, s.mlp_bias, "mlp_in"))
        if not s.fused_gate_up:
            found.append(Linear(s.names[1], h, width, count, s.mlp_bias, "mlp_in"))
        found.append(Linear(s.names[2], width, h, count, s.mlp_bias, "mlp_mid"))
    return tuple(found)


# What each family adds to a plain Llama. Values are fields of ModelShape.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {},
    "mixtral": {},
    "qwen2": {"qkv_bias": True},
    "qwen2_moe": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "qwen3_moe": {"qk_norm": "head"},
    "gemma": {"norm": "rms_offset"},
    "gemma2": {"norm": "rms_offset", "norms_per_layer": 4},
    "gemma3_text": {"norm": "rms_offset", "norms_per_layer": 4, "qk_norm": "head"},
    "phi3": {"fused_qkv": "qkv_proj", "fused_gate_up": "gate_up_proj"},
    "granite": {},
    "smollm3": {},
    "olmo2": {"qk_norm": "full"},
    "gpt_oss": {"qkv_bias": True, "o_bias": True, "sinks": True, "expert_bias": True, "router_bias": True},
    "stablelm": {"norm": "layer", "norm_bias": True},
    "starcoder2": {"norm": "layer", "norm_bias": True, "gated_mlp": False, "names": ("o_proj", "c_fc", "c_proj")},
    "gpt_neox": {
        "norm": "layer",
        "norm_bias": True,
        "gated_mlp": False,
        "fused_qkv": "query_key_value",
        "names": ("dense", "dense_h_to_4h", "dense_4h_to_h"),
        "mlp_bias": True,
    },
    "gpt2": {
        "norm": "layer",
        "norm_bias": True,
        "gated_mlp": False,
        "fused_qkv": "c_attn",
        "names": ("c_proj", "c_fc", "c_proj"),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    },
    "plamo": {"norms_per_layer": 1},
}
_TIED_BY_DEFAULT = {"gemma", "gemma2", "gemma3_text", "gpt2", "starcoder2"}
_NOT_CAUSAL_TRANSFORMERS = ("mamba", "rwkv", "bert", "t5", "plamo2", "jamba", "zamba", "falcon_h1", "whisper", "clip")
# transformers' own spelling first, then older ones and other families'.
_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head"),
    "vocab": ("vocab_size",),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
    "max_position": ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token"),
}


def _first(config: Mapping[str, Any], field: str) -> int:
    for name in _ALIASES[field]:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _from_config(outer: dict[str, Any], name: str) -> ModelShape:
    inner = outer.get("text_config")
    # Transformers leaves out of a nested text_config what it inherits from the outer one.
    config: dict[str, Any] = {**outer, **inner} if isinstance(inner, dict) else outer
    family = str(config.get("model_type", ""))
    family = {"gemma3": "gemma3_text"}.get(family, family)
    if any(word in family for word in _NOT_CAUSAL_TRANSFORMERS) or config.get("is_encoder_decoder"):
        raise ModelError(
            tr("A model of the type `{family}` is not a causal transformer: kitaeru cannot train it.", family=family),
            where=name or None,
            remedy=tr("Choose a causal language model, for example one that `kitaeru models` lists."),
        )
    missing = [field for field in ("hidden", "layers", "heads", "vocab") if not _first(config, field)]
    if missing:
        keys = ", ".join(_ALIASES[field][0] for field in missing)
        raise ModelError(
            tr("The model's config.json says nothing of {keys}.", keys=keys),
            where=name or None,
            remedy=tr("Name a folder or Hub id whose config.json is complete."),
        )
    shape = ModelShape(family=family, name=name, **_sizes(config, family))
    shape = replace(shape, **_FAMILIES.get(family, {}), exact=family in _FAMILIES)
    return replace(shape, **_options(config, family))


def _sizes(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    hidden, heads = _first(config, "hidden"), _first(config, "heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if family == "plamo":  # num_key_value_heads is not what its code reads
        kv_heads = -(-heads // int(config.get("n_shared_head", 1)))
    if family in ("gpt2", "gpt_neox"):  # every head has its own keys, whatever the config says
        kv_heads = heads
    tied = config.get("tie_word_embeddings")
    experts = _first(config, "experts") if family not in ("llama", "mistral", "qwen2", "qwen3") else 0
    intermediate = _first(config, "intermediate") or 4 * hidden
    sizes: dict[str, Any] = {
        "hidden": hidden,
        "intermediate": intermediate,
        "layers": _first(config, "layers"),
        "heads": heads,
        "kv_heads": int(kv_heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "vocab": _first(config, "vocab"),
        "tied": family in _TIED_BY_DEFAULT if tied is None else bool(tied),
        "max_position": _first(config, "max_position"),
    }
    if experts:
        sizes |= {
            "experts": experts,
            "experts_per_token": _first(config, "experts_per_token") or 2,
            "expert_intermediate": int(config.get("moe_intermediate_size") or intermediate),
            "shared_expert_intermediate": int(config.get("shared_expert_intermediate_size") or 0),
            "dense_layers": _dense_layers(config, family),
        }
    return sizes


def _dense_layers(config: Mapping[str, Any], family: str) -> int:
    if family not in ("qwen2_moe", "qwen3_moe"):
        return 0
    step, named = int(config.get("decoder_sparse_step") or 1), set(config.get("mlp_only_layers") or ())
    return sum(1 for i in range(_first(config, "layers")) if i in named or (i + 1) % step)


def _options(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """What a config switches on or off beside its family's habits."""
    options: dict[str, Any] = {"attention_dropout": float(config.get("attention_dropout") or 0.0)}
    share = config.get("partial_rotary_factor") or (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    options["rotary_share"] = float(share or config.get("rotary_pct") or 1.0)
    options["parallel_residual"] = bool(config.get("use_parallel_residual", family == "gpt_neox"))
    if family in (
        "llama",
        "mistral",
        "qwen3",
        "qwen3_moe",
        "granite",
        "smollm3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo2",
    ):
        options["qkv_bias"] = options["o_bias"] = bool(config.get("attention_bias"))
    if family in ("llama", "granite", "smollm3"):
        options["mlp_bias"] = bool(config.get("mlp_bias"))
    if family in ("qwen2", "qwen2_moe") and config.get("qkv_bias") is False:
        options["qkv_bias"] = False
    if family == "stablelm":
        options["qkv_bias"] = bool(config.get("use_qkv_bias"))
    if family == "starcoder2" and config.get("use_bias", True):
        options |= {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
    if family == "gpt_neox":
        options["qkv_bias"] = options["o_bias"] = bool(config.get("attention_bias", True))
    if family == "gpt2":
        options["learned_positions"] = _first(config, "max_position") or 1024
    if family == "gemma2":
        cap, final = config.get("attn_logit_softcapping", 50.0), config.get("final_logit_softcapping", 30.0)
        options |= {"attention_softcap": float(cap or 0), "final_softcap": float(final or 0)}
    return options | _sliding(config, family)


def _sliding(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    window, layers = config.get("sliding_window"), _first(config, "layers")
    if family in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe") and not config.get("use_sliding_window"):
        return {}
    if family == "gemma2" and window is None:
        window = 4096
    if not window:
        return {}
    kinds = config.get("layer_types")
    if kinds:
        sliding = sum(kind == "sliding_attention" for kind in kinds)
    elif family in ("gemma2", "gpt_oss"):
        sliding = (layers + 1) // 2
    elif family == "gemma3_text":
        sliding = layers - layers // int(config.get("sliding_window_pattern") or 6)
    elif family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        sliding = max(0, layers - int(config.get("max_window_layers") or 0))
    else:
        sliding = layers
    return {"sliding_window": int(window) if sliding else 0, "sliding_layers": sliding}


@dataclass(frozen=True)
class Entry:
    """A model of the catalogue: its Hub id, its config, the parameters counted by transformers, its licence."""

    name: str
    config: dict[str, Any]
    parameters: int
    licence: str = ""
    gated: bool = False
    note: str = ""


@cache
def catalogue() -> tuple[Entry, ...]:
    """The known models, in the order of the file."""
    value = json.loads((Path(__file__).parent / "catalogue.json").read_text(encoding="utf-8"))
    names = {f.name for f in fields(Entry)}
    return tuple(Entry(**{key: item for key, item in row.items() if key in names}) for row in value["models"])


@cache
def _by_name() -> dict[str, Entry]:
    return {entry.name.lower(): entry for entry in catalogue()}
