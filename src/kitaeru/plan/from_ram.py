"""What full training costs when weights, gradients and moments lie in RAM and layers come to the devices one at a time
(parallel.offload): bytes on a device, bytes of RAM, and what a step waits for.
"""

from __future__ import annotations

from dataclasses import dataclass

from kitaeru.plan.activations import activation_bytes, one_layer_bytes
from kitaeru.plan.layouts import LAYERS_AT_ONCE
from kitaeru.plan.memory import head_bytes, library_bytes, workspace_bytes
from kitaeru.plan.stored import Setting, compute_bytes, optimizer_bytes
from kitaeru.plan.types import Layout
from kitaeru.shape import ModelShape

Items = dict[str, int]

# Numbers that are cast on the device at a time.
CAST_AT_ONCE = 16 << 20
# Bytes of RAM that a weight's update moves: 32-bit weight there and back, gradient, two moments there and back; torch's
# AdamW wants the gradient clipped before, there and back once more.
UPDATE_BYTES = {"adamw": 36, "adamw_16bit": 20}


@dataclass(frozen=True)
class Parts:
    """Numbers in one layer, those of them that are cast on arrival, the largest weight, and what lies outside of the
    layers.

    >>> parts_of(ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256))
    Parts(layer=218112000, cast=218103808, widest=58720256, outside=1050677248)
    """

    layer: int
    cast: int
    widest: int
    outside: int


def parts_of(shape: ModelShape) -> Parts:
    """How a model divides."""
    outside = shape.embedding_parameters() + shape.hidden
    widest = max(linear.weights for linear in shape.linears())
    if shape.experts:
        widest = max(widest, 2 * shape.experts * shape.expert_intermediate * shape.hidden)
    cast = shape.linear_parameters() // shape.layers
    return Parts(-(-(shape.parameters() - outside) // shape.layers), cast, widest, outside)


def slot_bytes(layout: Layout, shape: ModelShape) -> int:
    """One layer's weights as they are on a device."""
    parts = parts_of(shape)
    return compute_bytes(layout) * parts.cast + 4 * (parts.layer - parts.cast)


def sent_bytes(layout: Layout, shape: ModelShape) -> int:
    """One layer's gradients as one device sends them down: as they are computed, or as its rows of a sum in 32 bits."""
    if layout.shared_by == 1:
        return slot_bytes(layout, shape)
    return -(-4 * parts_of(shape).layer // layout.shared_by)


def device_moments(layout: Layout, shape: ModelShape, setting: Setting) -> list[Items]:
    """What is on a device at each moment of a step that may be its fullest: the loss head, the last norm's and the last
    layer's backward pass, the end of it.

    Always there: what lies outside of the layers and, from the second micro-batch on, its gradients; slots for layers;
    rows on their way, and numbers that are cast. In the backward pass beside the layer's own gradients those that are
    still being sent.
    """
    parts, width = parts_of(shape), slot_bytes(layout, shape)
    several = 4 * parts.widest if layout.shared_by > 1 else 0
    gathered = LAYERS_AT_ONCE * width + several // layout.shared_by
    gathered += 4 * min(parts.widest, CAST_AT_ONCE) if layout.device == "cuda" else 0
    # A sum over devices is made in 32 bits, one weight after the other.
    summed = several + LAYERS_AT_ONCE * sent_bytes(layout, shape) if layout.shared_by > 1 else 0
    sending = width * (1 + LAYERS_AT_ONCE) + summed
    tables = 4 * parts.outside
    held = tables if setting.accumulates else 0
    head = 4 * shape.vocab * shape.hidden
    kept = activation_bytes(layout, shape, setting)
    norm, layer = workspace_bytes(layout, shape, setting.lora)
    last = one_layer_bytes(layout, shape, setting)
    always = {"weights": tables, "gathered": gathered} | library_bytes(layout)
    if layout.device == "cpu":
        always |= _on_a_cpu(layout, shape, setting)
        held += 4 * shape.parameters() // layout.shared_by
        tables += 4 * shape.parameters() // layout.shared_by
    return [
        {**always, "gradients": held, "activations": kept, "head": head_bytes(layout, shape)},
        {**always, "gradients": held, "activations": kept, "head": head, "workspace": norm},
        {
            **always,
            "gradients": held,
            "activations": kept + last,
            "head": head,
            "workspace": layer,
            "communication": sending,
        },
        # The input table's gradient comes last, and is added where there is one already.
        {
            **always,
            "gradients": tables,
            "head": head if setting.accumulates else 0,
            "activations": last,
            "communication": sending,
        },
        {**always, "gradients": tables},
    ]


def _on_a_cpu(layout: Layout, shape: ModelShape, setting: Setting) -> Items:
    """On a CPU the device's memory is the RAM, and holds this process's rows too."""
    rows = 4 * shape.parameters() // layout.shared_by
    moments = optimizer_bytes(setting.optimizer, layout, shape, setting.lora) // layout.shared_by
    return {"weights": 4 * parts_of(shape).outside + rows, "optimizer": moments}


def ram_items(layout: Layout, shape: ModelShape, setting: Setting) -> Items:
    """Bytes of RAM for all devices: of each copy the weights in 32 bits, sums of gradients in 32 bits, and moments;
    locked buffers through which gradients come.

    >>> from kitaeru.recipe.types import LoraSection
    >>> llama = ModelShape("llama", 4096, 14336, 32, 32, 8, 128, 128256)
    >>> layout = Layout("single", "full", "none", "bf16", "recompute", 8192, "cuda", variant="offload")
    >>> items = ram_items(layout, llama, Setting(LoraSection(), "adamw_16bit"))
    >>> {name: round(size / 1e9, 1) for name, size in items.items()}
    {'weights': 32.1, 'gradients': 32.1, 'optimizer': 32.1, 'pinned': 0.9}
    """
    copies = layout.devices // layout.shared_by
    count = copies * shape.parameters()
    return {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": copies * optimizer_bytes(setting.optimizer, layout, shape, setting.lora),
        "pinned": layout.devices * LAYERS_AT_ONCE * sent_bytes(layout, shape),
    }


@dataclass(frozen=True)
class Traffic:
    """Rates that the traffic runs at, bytes/s: of one device's copies, of the host's memory (for one of the models that
    lie in it), between the devices of a copy.
    """

    copies: float
    memory: float
    link: float


def layer_seconds(layout: Layout, shape: ModelShape, at: Traffic) -> tuple[float, float]:
    """What a layer's forward and backward pass must last to hide the traffic behind it. Weights come up in 32 bits,
    each device's rows, and are put together; gradients are added up, go down beside them, and to the sums in RAM.
    """
    parts, count = parts_of(shape), layout.shared_by
    share = (count - 1) / count
    up = 4 * parts.layer / count / at.copies + share * slot_bytes(layout, shape) / at.link
    down = sent_bytes(layout, shape) / at.copies + share * 4 * parts.layer / at.link
    sent = count * sent_bytes(layout, shape)
    memory = (4 * parts.layer + 2 * sent + 8 * parts.layer) / at.memory
    return max(up, 4 * parts.layer / at.memory), max(up, down, memory)


def step_seconds(layout: Layout, shape: ModelShape, setting: Setting, at: Traffic) -> tuple[float, float]:
    """The optimizer at the end of a step, which works through RAM, and the tables' way down and up again."""
    parts, count = parts_of(shape), layout.shared_by
    moved = UPDATE_BYTES[setting.optimizer] * shape.parameters()
    tables = 2 * 4 * parts.outside * (1 / count / at.copies + (count - 1) / count / at.link)
    return moved / at.memory, tables
