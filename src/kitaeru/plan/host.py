"""RAM of the machine, item by item: processes, weights on their way to a device, what an offload keeps there."""

from __future__ import annotations

from kitaeru.i18n import N_
from kitaeru.plan.activations import offloaded_bytes
from kitaeru.plan.from_ram import ram_items
from kitaeru.plan.layouts import comes_in_parts
from kitaeru.plan.memory import GPU_PROCESS_HOST_BYTES, host_bytes
from kitaeru.plan.ranks import layer_weight_bytes
from kitaeru.plan.stored import Setting, trained_parameters, trains_all, trains_from_ram, weight_bytes
from kitaeru.plan.types import Layout
from kitaeru.shape import ModelShape

# Bytes of a trained number in RAM under DeepSpeed: AdamW on the CPU has a 32-bit weight, two moments and a 32-bit
# gradient. There is a gradient more, in which micro-batches add up, and with ZeRO-2 another weight, on its way back.
OPTIMIZER_BYTES = {"zero2": 16, "zero3": 12}
GRADIENT_BYTES = {"zero2": 8, "zero3": 8}
# Pinned buffers through which a device's copies go, for each device.
PINNED_BYTES = 10**9

HOST_ITEMS: dict[str, str] = {
    "processes": N_("Python and its libraries, for each process"),
    "loading": N_("weights on their way to the devices"),
    "optimizer": N_("the optimizer's state"),
    "gradients": N_("gradients on their way to the optimizer"),
    "weights": N_("weights that come to the devices layer by layer"),
    "activations": N_("activations of all devices, until their backward pass"),
    "pinned": N_("pinned buffers of the copies"),
}


def host_items(layout: Layout, shape: ModelShape, setting: Setting) -> dict[str, int]:
    """Bytes of RAM by item; loading and the rest are counted together, since a resumed run may have both.

    >>> llama = ModelShape("llama", 4096, 11008, 32, 32, 32, 128, 32000)
    >>> from kitaeru.recipe.types import LoraSection
    >>> cut = Layout("zero3", "full", "none", "bf16", "recompute", 2048, "cuda", 2, "offload", 2)
    >>> sum(host_items(cut, llama, Setting(LoraSection())).values()) // 10**9
    145
    """
    if layout.device == "cpu":
        return {"processes": host_bytes(layout, shape, setting) * layout.devices}
    processes = 1 if layout.strategy in ("single", "model_parallel") else layout.devices
    loading = host_bytes(layout, shape, setting) - GPU_PROCESS_HOST_BYTES
    if comes_in_parts(layout, setting.lora):  # each process reads a layer of its own at a time
        layer, outside = layer_weight_bytes(layout, shape)
        loading = layout.devices * layer + outside
    elif layout.strategy == "fsdp" or trains_from_ram(layout):
        # Each has the whole model in RAM before it cuts its pieces out.
        loading += layout.devices * sum(weight_bytes(layout, shape))
    items = {"processes": processes * GPU_PROCESS_HOST_BYTES, "loading": loading}
    if layout.activations == "offload":
        items["activations"] = layout.devices * offloaded_bytes(layout, shape)
    if trains_from_ram(layout):
        items |= ram_items(layout, shape, setting)
    elif layout.strategy == "fsdp" and layout.variant and not trains_all(layout) and layout.variant != "grad":
        items["weights"] = layout.devices // layout.shared_by * weight_bytes(layout, shape)[0]
        items["pinned"] = PINNED_BYTES * layout.devices
    elif layout.variant.startswith("offload"):
        trained = trained_parameters(layout, shape, setting.lora)
        items["optimizer"] = OPTIMIZER_BYTES[layout.strategy] * trained
        items["gradients"] = GRADIENT_BYTES[layout.strategy] * trained
        items["pinned"] = PINNED_BYTES * layout.devices
        if layout.variant == "offload-all":
            items["weights"] = 4 * shape.parameters()
    if layout.strategy == "zero3":
        # Before its optimizer is made, DeepSpeed lays out in RAM what it trains; a model that does not come in parts is
        # whole in each process.
        before = 4 * trained_parameters(layout, shape, setting.lora)
        if not comes_in_parts(layout, setting.lora):
            before = max(before, layout.devices * sum(weight_bytes(layout, shape)))
        items["loading"] += max(0, before - sum(items.values()) + items["processes"])
    return {name: size for name, size in items.items() if size}
