"""A mixture's experts in 4 or 8 bits. Transformers stacks them in tensors that bitsandbytes leaves as they are.

Experts are recognised by what they compute: two products around a gated activation, weights [E, 2f, h] and [E, h, f].
They are packed while they are loaded, a stack at a time. Adapters on them are PEFT's, with PEFT's names and files.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.kernels.experts import Adapter, Stack, experts
from kitaeru.kernels.gated import Activation
from kitaeru.plan.stored import NF4_BLOCK, NF4_SECOND_BLOCK

Bits = Literal["nf4", "int8"]
STACKS = ("gate_up_proj", "down_proj")


class PackedExperts(nn.Module):
    """In the place of a transformers module of experts. Called as that is: (x [T, h], index [T, k], weights [T, k]).

    Each stack is a parameter of its old name that holds packed bytes, and buffers that say what they stand for; none of
    them is ever trained. `widths` are (f, h), `compute` is the dtype in which they are expanded for adapters to match.
    """

    def __init__(
        self, count: int, widths: tuple[int, int], activation: Activation, bits: Bits, compute: torch.dtype
    ) -> None:
        super().__init__()
        f, h = widths
        self.num_experts, self.activation, self.bits, self.compute = count, activation, bits, compute
        self.shapes = {"gate_up_proj": (count, 2 * f, h), "down_proj": (count, h, f)}
        self.adapters: dict[str, Adapter] = {}
        self._offsets: dict[str, float] = {}
        for name, shape in self.shapes.items():
            for part, (size, dtype) in _parts(shape, bits).items():
                empty = torch.empty(size, dtype=dtype)
                if part:
                    self.register_buffer(f"{name}_{part}", empty)
                else:
                    self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, h] to [T, h]."""
        adapters = (self.adapters.get(STACKS[0]), self.adapters.get(STACKS[1]))
        return experts(hidden, index, weights, self.stack(STACKS[0]), self.stack(STACKS[1]), self.activation, adapters)

    def stack(self, name: str) -> Stack:
        """A stack as the kernels take it."""
        shape, data = self.shapes[name], getattr(self, name).data
        part = {part: self.get_buffer(f"{name}_{part}") for part in _parts(shape, self.bits) if part}
        if self.bits == "int8":
            return Stack("int8", shape, data, part["absmax"])
        if name not in self._offsets:
            self._offsets[name] = float(part["offset"])  # which the host waits for, once
        return Stack(
            "nf4", shape, data, part["absmax"], part["code"], part["absmax_code"], part["absmax_scale"],
            self._offsets[name],
        )  # fmt: skip

    def whole(self, name: str) -> Tensor:
        """A stack [E, N, K] as its bits stand for."""
        return self.stack(name).expanded(0, self.num_experts, self.compute)

    def like(self, name: str) -> Tensor:
        """A tensor with a stack's shape and device and no memory of its own, in the dtype adapters compute in."""
        return torch.empty(1, dtype=self.compute, device=getattr(self, name).device).expand(self.shapes[name])

    def extra_repr(self) -> str:
        """For people who print the model."""
        return ", ".join([f"{self.bits}", *(f"{name}={shape}" for name, shape in self.shapes.items())])


def _parts(shape: tuple[int, int, int], bits: Bits) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What a packed stack consists of: size and dtype by name, the packed bytes themselves under ""."""
    count, n, k = shape
    if bits == "int8":
        return {"": (shape, torch.int8), "absmax": ((count, n), torch.float32)}
    seconds = -(-n * k // (NF4_BLOCK * NF4_SECOND_BLOCK))
    return {
        "": ((count, n, k // 2), torch.uint8),
        "absmax": ((count, seconds * NF4_SECOND_BLOCK), torch.uint8),
        "absmax_scale": ((count, seconds), torch.float32),
        "absmax_code": ((256,), torch.float32),
        "code": ((16,), torch.float32),
        "offset": ((), torch.float32),
    }


@torch.no_grad()
def pack(whole: Tensor, bits: Bits) -> dict[str, Tensor]:
    """The parts of a stack [E, N, K] in few bits, packed one expert after the other; names as in `PackedExperts`.

    NF4 with double quantisation as bitsandbytes has it: a scale for each 64 values, less their mean in 8 bits again,
    with a scale for each 256 of them. INT8: a scale for each row.
    """
    if bits == "int8":
        absmax = whole.abs().amax(-1).float()
        data = torch.empty(whole.shape, dtype=torch.int8, device=whole.device)
        for expert, weight in enumerate(whole):
            data[expert] = (weight.float() * (127 / absmax[expert].clamp_min(1e-30))[:, None]).round().to(torch.int8)
        return {"": data, "absmax": absmax}
    shape = cast(tuple[int, int, int], tuple(whole.shape))
    parts = _parts(shape, bits)
    data = torch.empty(parts[""][0], dtype=torch.uint8, device=whole.device)
    first = torch.zeros(parts["absmax"][0], dtype=torch.float32, device=whole.device)
    blocks = shape[1] * shape[2] // NF4_BLOCK
    code = None
    for expert, weight in enumerate(whole):
        packed, state = bnb.functional.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        data[expert] = packed.view(data.shape[1:])
        first[expert, :blocks], code = state.absmax, state.code
    assert code is not None
    offset = first[:, :blocks].mean()
    first[:, :blocks] -= offset
    absmax, state = bnb.functional.quantize_blockwise(first, blocksize=NF4_SECOND_BLOCK)
    return {
        "": data,
        "absmax": absmax.view(first.shape),
        "absmax_scale": state.absmax.view(parts["absmax_scale"][0]),
        "absmax_code": state.code.to(whole.device),
        "code": code.to(whole.device),
        "offset": offset,
    }


def fill(module: PackedExperts, name: str, whole: Tensor) -> None:
    """Put a stack [E, N, K] into `module`, in its bits, on its device."""
    for part, tensor in pack(whole, module.bits).items():
        if part:
            setattr(module, f"{name}_{part}", tensor)
        else:
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    module._offsets.pop(name, None)


# --- putting them into a model ----------------------------------------------------------------------------------------


def make_room(model: nn.Module, bits: Bits) -> int:
    """Put empty packed experts in the place of those that are recognised. Returns how many modules."""
    found = 0
    for path, module in list(model.named_modules()):
        activation = recognised(module)
        if activation is None:
            continue
        gate_up: Any = module.gate_up_proj
        count, double, h = gate_up.shape
        with gate_up.device:
            packed = PackedExperts(count, (double // 2, h), activation, bits, gate_up.dtype)
        if gate_up.is_meta:  # what is read into it comes in these numbers
            for own in STACKS:
                setattr(packed, own, getattr(module, own).requires_grad_(False))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, packed)
        found += 1
    return found


def recognised(module: Any) -> Activation | None:
    """The activation, if this is a module of gated experts without biases that can be packed."""
    weights = dict(module.named_parameters(recurse=False))
    if set(weights) != set(STACKS) or any(weight.dim() != 3 for weight in weights.values()):
        return None
    (count, double, h), other = weights["gate_up_proj"].shape, weights["down_proj"].shape
    if other != (count, h, double // 2) or h % NF4_BLOCK or (double // 2) % NF4_BLOCK:
        return None
    flags = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True}
    more = getattr(module, "has_post_expert_norm", False) or any(True for _ in module.buffers(recurse=False))
    if more or any(getattr(module, name, value) != value for name, value in flags.items()):
        return None
    kind = type(getattr(module, "act_fn", None))
    activations: dict[Activation, Any] = {"silu": ACT2FN["silu"], "gelu_tanh": ACT2FN["gelu_pytorch_tanh"]}
    return next((name for name, act in activations.items() if type(act) is kind and _gates_plainly(module, act)), None)


def _gates_plainly(module: Any, act: Any) -> bool:
    """Whether act(gate) * up is all that happens between the two products."""
    both = torch.linspace(-30, 30, 64, device="cpu").view(2, 32)
    gate, up = both.chunk(2, -1)
    own = module._apply_gate(both) if hasattr(module, "_apply_gate") else act(gate) * up
    return torch.allclose(own, act(gate) * up)


# --- loading: transformers' way with bitsandbytes, and the experts packed as well -------------------------------------


class _Pack(ConversionOps):  # type: ignore[misc]
    """Packs a stack of experts, and leaves anything else to bitsandbytes."""

    def __init__(self, other: Any) -> None:
        self.other = other

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, **options: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            path, own = name.rsplit(".", 1)
            module = model.get_submodule(path)
            if isinstance(module, PackedExperts):
                whole = value[0] if isinstance(value, list) else value
                parts = pack(whole, module.bits)
                result[name] = nn.Parameter(parts.pop(""), requires_grad=False)
                result |= {f"{path}.{own}_{part}": tensor for part, tensor in parts.items()}
            else:
                result |= self.other.convert({name: value}, model=model, **options)
        return result


class _PacksExperts:
    """What both of bitsandbytes' quantisers have beside them."""

    bits: Bits

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)  # type: ignore[call-arg]
        # The name served to find this class; to everything else the model is one of bitsandbytes.
        quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, **options)  # type: ignore[misc]
        make_room(model, self.bits)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **options: Any) -> bool:
        if isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedExperts):
            return True
        needs: bool = super().param_needs_quantization(model, param_name, **options)  # type: ignore[misc]
        return needs

    def get_quantize_ops(self) -> _Pack:
        return _Pack(super().get_quantize_ops())  # type: ignore[misc]


class _Nf4(_PacksExperts, Bnb4BitHfQuantizer):  # type: ignore[misc]
    bits: Bits = "nf4"


class _Int8(_PacksExperts, Bnb8BitHfQuantizer):  # type: ignore[misc]
    bits: Bits = "int8"


def packing(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """`config`, with the experts stored in its bits too."""
    kind = _Int8 if config.load_in_8bit else _Nf4
    name = f"kitaeru_{kind.bits}"
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(name)(kind)
    config.quant_method = cast(Any, name)
    return config


# --- adapters ---------------------------------------------------------------------------------------------------------


class ParamWrapper(lora.layer.ParamWrapper):  # type: ignore[misc]  # PEFT knows its wrappers by this name
    """PEFT's adapter on a stack of experts, where the stack is packed: its factors are given to the experts' operation
    instead of being added to weights that are not there.
    """

    def get_param(self) -> Tensor:
        """A stand-in with the stack's shape, for PEFT to make an adapter by."""
        like: Tensor = self.get_base_layer().like(self.parameter_name)
        return like

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The experts with this adapter."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ModelError(
                tr("Packed experts take one adapter at a time."),
                remedy=tr("Merge the adapters, or load the model in 16 bits."),
            )
        base, name = self.get_base_layer(), active[0]
        base.adapters[self.parameter_name] = Adapter(
            self.lora_A[name].weight, self.lora_B[name].weight, float(self.scaling[name])
        )
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            del base.adapters[self.parameter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not into few bits.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            tr("An adapter cannot be merged into experts in few bits."),
            remedy=tr("Merge it into the model in 16 bits: kitaeru export RUN --to merged"),
        )


def adapt_packed(config: LoraConfig) -> LoraConfig:
    """`config`, so that PEFT puts adapters on packed experts the way they need them."""
    config._register_custom_module({PackedExperts: ParamWrapper})
    return config
