"""What is planned: a wish, a machine, a model and its data, and how much room the device has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kitaeru.errors import PlanError
from kitaeru.hardware import Device, Hardware
from kitaeru.i18n import tr
from kitaeru.plan.decide import Schedule, longest_example, schedule
from kitaeru.plan.host import host_items
from kitaeru.plan.layouts import precision_for
from kitaeru.plan.memory import device_overhead_bytes
from kitaeru.plan.stored import Setting, trains_all, trains_from_ram
from kitaeru.plan.types import DataFacts, Layout, Precision
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

GB = 10**9
# What torch's allocator holds beside what it has given out, of the peak (H100, 50 points: 1 to 6 %). More where pieces
# of other sizes come and go between what stays: with all weights trained, gradients that are let go of leave holes that
# activations must fit into (1 to 13 %); with gate and up kept in 8 bits those in 16 that they come from (6 to 11 %).
MARGIN, TRAINED_MARGIN, KEEP8_MARGIN = 0.04, 0.065, 0.07
FRAGMENTATION_BYTES = 100 * 10**6
CPU_MARGIN = 0.15
# More tokens at a time take memory and give no speed.
GPU_MICRO_BATCH_TOKENS, CPU_MICRO_BATCH_TOKENS = 16384, 2048
# torch's packed attention knows grouped heads from here on.
GROUPED_PACKED_ATTENTION = (2, 13)


@dataclass(frozen=True)
class Problem:
    """What is planned: the wish, the machine's device (None: the CPU), the model, the data, and the run's schedule."""

    recipe: Recipe
    hardware: Hardware
    shape: ModelShape
    device: Device | None
    precision: Precision
    schedule: Schedule
    longest: int
    facts: DataFacts | None = None

    @property
    def world(self) -> int:
        """Devices there are to train on: GPUs, or processes on a CPU."""
        if self.recipe.limits.devices is not None:
            return self.recipe.limits.devices
        if self.device is None:
            return 1 if self.recipe.strategy in ("auto", "single") else 2
        return max(1, len(self.hardware.devices))

    def device_of(self, rank: int, layout: Layout | None = None) -> Device | None:
        """The device of a rank: of a layout with one device the roomiest; with more ranks than GPUs they share them."""
        if self.device is None or (layout is not None and layout.devices == 1):
            return self.device
        return self.hardware.devices[rank % len(self.hardware.devices)]

    @property
    def typical(self) -> float:
        """Tokens of the example that a token is in, on average: longer examples hold more of the tokens."""
        if self.facts is None or not self.facts.examples:
            return float(self.longest)
        return max(1.0, min(float(self.longest), 1.5 * self.facts.tokens / self.facts.examples))

    @property
    def even(self) -> bool:
        """Whether all examples are known to be of one length."""
        return self.facts is not None and 0 < self.facts.tokens == self.facts.examples * self.facts.longest

    @property
    def short(self) -> float:
        """Tokens by which a batch is short of what it may have, on average: half of the example that did not fit."""
        return 0.0 if self.facts is None or self.even else self.typical / 2

    @property
    def usual_micro_batch(self) -> int:
        """Tokens that keep the device busy."""
        return CPU_MICRO_BATCH_TOKENS if self.device is None else GPU_MICRO_BATCH_TOKENS

    @property
    def least_micro_batch(self) -> int:
        """Tokens that hold the longest example, in eights."""
        return -(-self.longest // 8) * 8

    @property
    def device_name(self) -> str:
        """The device, for people."""
        return tr("this machine's RAM") if self.device is None else self.device.name


def state(recipe: Recipe, hardware: Hardware, shape: ModelShape, facts: DataFacts | None) -> Problem:
    """The problem behind a recipe.

    Raises:
        PlanError: it asks for a micro-batch that cannot hold the longest example.
    """
    if recipe.limits.ram_gb is not None:
        hardware = replace(hardware, host_free_bytes=min(hardware.host_free_bytes, int(recipe.limits.ram_gb * GB)))
    device = pick_device(recipe, hardware)
    longest = longest_example(recipe, shape, facts)
    micro = recipe.limits.micro_batch_tokens
    if micro is not None and micro < longest:
        sizes = {"longest": longest, "micro": micro}
        raise PlanError(
            tr("The longest example has {longest} tokens, but a micro-batch only {micro}.", **sizes),
            remedy=tr("Raise limits.micro_batch_tokens to {longest}, or lower data.seq_len to {micro}.", **sizes),
        )
    plan = schedule(recipe, longest, facts, on_cpu=device is None)
    return Problem(recipe, hardware, shape, device, precision_for(recipe, device), plan, longest, facts)


def pick_device(recipe: Recipe, hardware: Hardware) -> Device | None:
    """The device that trains alone: the roomiest GPU, unless the recipe wants the CPU; None is the CPU."""
    return None if recipe.limits.device == "cpu" else hardware.roomiest


def global_tokens(problem: Problem) -> int:
    """Tokens of one step at most."""
    if problem.schedule.global_batch_tokens is not None:
        return problem.schedule.global_batch_tokens
    return (problem.schedule.global_batch_examples or 1) * problem.longest


def setting_of(problem: Problem, layout: Layout) -> Setting:
    """What the bytes of a layout depend on beside it."""
    version = problem.hardware.versions.get("torch", "").split("+")[0].split(".")[:2]
    known = tuple(int(part) for part in version if part.isdigit())
    setting = Setting(
        lora=problem.recipe.lora,
        optimizer="adamw" if problem.recipe.train.optimizer == "auto" else problem.recipe.train.optimizer,
        attention=problem.recipe.model.attention,
        accumulates=layout.micro_batch_tokens * layout.replicas < global_tokens(problem),
        repeats_keys=known < GROUPED_PACKED_ATTENTION,
    )
    if problem.recipe.train.optimizer != "auto" or not trains_from_ram(layout):
        return setting
    wide = sum(host_items(layout, problem.shape, setting).values()) * (1 + MARGIN)
    return setting if wide <= problem.hardware.host_free_bytes else replace(setting, optimizer="adamw_16bit")


def needed_per_byte(layout: Layout) -> float:
    """What must be free for one more byte of a predicted peak."""
    if layout.device == "cpu":
        return 1 + CPU_MARGIN
    if trains_all(layout) and not trains_from_ram(layout):
        return 1 + TRAINED_MARGIN
    return 1 + (KEEP8_MARGIN if layout.activations == "keep8" and not layout.recomputed else MARGIN)


def needed_bytes(layout: Layout, peak: int) -> int:
    """What must be free for a predicted peak: a margin, and on a GPU the context and fragmentation of the allocator.

    >>> needed_bytes(Layout("single", "lora", "none", "bf16", "keep", 4096, "cuda"), 20 * 10**9) / 10**9
    21.7
    """
    if layout.device == "cpu":
        return int(peak * needed_per_byte(layout))
    return int(peak * needed_per_byte(layout)) + device_overhead_bytes(layout) + FRAGMENTATION_BYTES


def free_bytes(problem: Problem, layout: Layout | None = None, rank: int = 0) -> int:
    """What a rank's device (without a layout: the roomiest one) has free for it, at most `limits.memory_gb`."""
    ranks = 1 if layout is None else layout.devices
    device = problem.device if layout is None else problem.device_of(rank, layout)
    if device is None:
        free = problem.hardware.host_free_bytes // ranks
    else:
        free = device.free_bytes // -(-ranks // len(problem.hardware.devices))
    limit = problem.recipe.limits.memory_gb
    return free if limit is None else min(free, int(limit * GB))
