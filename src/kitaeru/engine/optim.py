"""Optimizers: parameter groups, the library that does each, and their state keyed by parameter name.

State leaves and enters through `optimizer_state` and `load_optimizer_state` instead of torch's `state_dict`: that one
numbers parameters by position, casts on loading, and loses the paging of bitsandbytes' paged optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kitaeru.engine.adamw16 import AdamW16
from kitaeru.errors import CheckpointError, MissingLibraryError, TrainingError
from kitaeru.i18n import tr
from kitaeru.recipe.types import TrainSection

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def build_optimizer(
    named_parameters: NamedParameters,
    section: TrainSection,
    *,
    learning_rate: float,
    lora_plus_ratio: float | None,
    device_type: str,
    first_rows: Mapping[str, int] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer `section` asks for over `named_parameters`, at its peak learning rate.

    Every group carries `name` and `initial_lr` (its peak); `set_rate` scales them. `device_type` is where the
    parameters are ("cpu", "cuda"). `first_rows`: for parameters that are pieces, the number of their first row.

    Raises:
        MissingLibraryError: the optimizer lives in bitsandbytes, which is not installed.
        TrainingError: bitsandbytes is installed and does not work on this device.
    """
    groups = parameter_groups(
        named_parameters,
        learning_rate=learning_rate,
        weight_decay=section.weight_decay,
        lora_plus_ratio=lora_plus_ratio,
    )
    betas = (section.beta1, section.beta2)
    match section.optimizer:
        case "auto" | "adamw":
            fused = device_type in ("cuda", "cpu")
            return torch.optim.AdamW(
                groups, lr=learning_rate, betas=betas, eps=section.epsilon, fused=fused, foreach=None if fused else True
            )
        case "adamw_16bit":
            firsts = first_rows or {}
            places = {p: (name, firsts.get(name, 0) * p.shape[1:].numel()) for name, p in named_parameters}
            return AdamW16(groups, lr=learning_rate, betas=betas, eps=section.epsilon, places=places)
        case "adamw_8bit" | "paged_adamw_8bit":
            # Paging moves state between GPU and host; on a CPU there is nothing to move.
            paged = section.optimizer == "paged_adamw_8bit" and device_type == "cuda"
            make = _from_bitsandbytes("PagedAdamW8bit" if paged else "AdamW8bit", section.optimizer, device_type)
            return make(groups, lr=learning_rate, betas=betas, eps=section.epsilon)
        case "lion":
            return _from_bitsandbytes("Lion", section.optimizer, device_type)(groups, lr=learning_rate, betas=betas)
        case "adafactor":
            return _adafactor(groups, learning_rate)


def parameter_groups(
    named_parameters: NamedParameters, *, learning_rate: float, weight_decay: float, lora_plus_ratio: float | None
) -> list[dict[str, Any]]:
    """Groups by what differs: weight decay (not for norms, biases and other vectors) and LoRA+'s faster B.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives the zero-initialised B of a linear layer `lora_plus_ratio` times
    the rate of A. Order inside a group follows `named_parameters`; empty groups are left out.
    """
    members: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "lora_b": []}
    for name, parameter in named_parameters:
        if lora_plus_ratio is not None and "lora_B" in name.split("."):
            members["lora_b"].append(parameter)
        elif parameter.ndim < 2 or name.endswith("bias"):
            members["no_decay"].append(parameter)
        else:
            members["decay"].append(parameter)
    groups = []
    for name, parameters in members.items():
        peak = learning_rate * (lora_plus_ratio or 1.0) if name == "lora_b" else learning_rate
        decay = 0.0 if name == "no_decay" else weight_decay
        if parameters:
            groups.append({"params": parameters, "name": name, "lr": peak, "initial_lr": peak, "weight_decay": decay})
    return groups


def set_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Set every group's learning rate to `multiplier` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def _adafactor(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    """Adafactor with the rate of the schedule.

    transformers' and not torch's: torch's always scales a step by the parameter's own size, and so hardly moves a LoRA
    B that starts at zero.
    """
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(
        groups, lr=learning_rate, scale_parameter=False, relative_step=False, warmup_init=False
    )
    return optimizer


def _from_bitsandbytes(class_name: str, optimizer: str, device_type: str) -> Callable[..., torch.optim.Optimizer]:
    """The class from bitsandbytes, after one step on a scrap parameter has shown that its kernels work here."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingLibraryError(
            "bitsandbytes", tr("The optimizer {name}", name=optimizer), "pip install bitsandbytes"
        ) from error
    make: Callable[..., torch.optim.Optimizer] = getattr(bitsandbytes.optim, class_name)
    scrap = nn.Parameter(torch.zeros(4096, device=device_type))
    scrap.grad = torch.ones_like(scrap)
    try:
        make([scrap], lr=1e-3).step()
    except Exception as error:
        raise TrainingError(
            tr("The optimizer {name} does not work here: {error}", name=optimizer, error=error),
            remedy=tr("Use `train.optimizer: adamw`, or mend bitsandbytes (`kitaeru doctor` tells more)."),
        ) from error
    return make


def optimizer_state(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters, *, copy: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A copy of the optimizer's state: CPU tensors as "PARAMETER/KEY", and what is no tensor as JSON-able values.
    Without `copy` the tensors are the living ones, where they are.

    Shapes and dtypes are the optimizer's own (uint8 for 8-bit moments, with their absmax and qmap).
    """
    if any(parameter.is_cuda for _, parameter in named_parameters):
        torch.cuda.synchronize()  # paged state is read by the CPU directly and must not be in flight
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach()
                if copy:
                    apart = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                    tensors[f"{name}/{key}"] = apart
            elif isinstance(value, int | float | str | None):
                values.setdefault(name, {})[key] = value
            else:
                raise TypeError(f"{_kind(optimizer)} keeps a {type(value).__name__} as {key!r}; it cannot be saved")
    return tensors, {"optimizer": _kind(optimizer), "values": values}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    tensors: dict[str, torch.Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_state` gave, bit for bit (AdamW's moments as wide as this one has them); any state the
    optimizer had is dropped. `tensors` is emptied on the way, so that RAM need not hold everything twice.

    Raises:
        CheckpointError: the state is another optimizer's, or of parameters that are not here or have another shape.
    """
    parameters = dict(named_parameters)
    states = _by_parameter(tensors, scalars["values"])
    tensors.clear()
    _check_fit(_kind(optimizer), scalars["optimizer"], parameters, states)
    optimizer.state.clear()
    with torch.no_grad():
        for group in optimizer.param_groups:
            members = {id(parameter) for parameter in group["params"]}
            for name in [name for name in states if id(parameters[name]) in members]:
                state, placed = states.pop(name), optimizer.state[parameters[name]]
                for key in list(state):
                    placed[key] = _placed(optimizer, group, parameters[name], key, state.pop(key))


def _by_parameter(
    tensors: Mapping[str, torch.Tensor], values: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    states: dict[str, dict[str, Any]] = {name: dict(value) for name, value in values.items()}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        states.setdefault(name, {})[key] = tensor
    return states


def _check_fit(
    kind: str, saved_kind: str, parameters: Mapping[str, nn.Parameter], states: Mapping[str, Mapping[str, Any]]
) -> None:
    remedy = tr("Resume with the recipe the checkpoint was written with, or start a new run with another `output`.")
    if kind != saved_kind:
        what = tr("The checkpoint holds the state of {saved}, and this run uses {now}.", saved=saved_kind, now=kind)
        raise CheckpointError(what, remedy=remedy)
    misfits = [name for name in states if name not in parameters or not _same_shape(parameters[name], states[name])]
    if misfits:
        what = tr(
            "The checkpoint holds optimizer state for {count} parameters that this model does not train in that shape, "
            "the first of them {name}.",
            count=len(misfits),
            name=misfits[0],
        )
        raise CheckpointError(what, remedy=remedy)


def _same_shape(parameter: nn.Parameter, state: Mapping[str, Any]) -> bool:
    # Moments that are not factored have the parameter's shape; the other tensors (absmax, rows, columns) do not.
    moments: Iterable[Any] = (state.get(key) for key in ("exp_avg", "exp_avg_sq", "state1", "state2"))
    return all(moment is None or moment.shape == parameter.shape for moment in moments)


def _placed(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: nn.Parameter, key: str, value: Any
) -> Any:
    """`value` in the memory where the optimizer itself would have put it."""
    if not isinstance(value, torch.Tensor):
        return value
    if key == "step":  # torch keeps the step count on the CPU unless its kernel reads it
        on_device = group.get("fused") or group.get("capturable")
        return value.to(parameter.device if on_device else "cpu", copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    if key in AdamW16.MOMENTS and isinstance(optimizer, AdamW16 | torch.optim.AdamW):
        value = value.to(torch.bfloat16 if isinstance(optimizer, AdamW16) else parameter.dtype)
    buffer_of = getattr(optimizer, "get_state_buffer", None)  # bitsandbytes: paged where it pages
    if buffer_of is not None and key in ("state1", "state2"):
        buffer: torch.Tensor = buffer_of(parameter, dtype=value.dtype)
    else:
        buffer = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    return buffer.copy_(value)


def _kind(optimizer: torch.optim.Optimizer) -> str:
    # Paged or not, the arithmetic and the state are the same: a run may go on where there is no paging. And moments in
    # 16 bits go on in 32, and the other way.
    return type(optimizer).__name__.removeprefix("Paged").removesuffix("16")
