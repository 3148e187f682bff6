"""The plan: what will happen, as plain data. The plan file is all that crosses into a process that trains."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from kitaeru.errors import PlanError
from kitaeru.files import write_json
from kitaeru.i18n import tr
from kitaeru.recipe.types import Recipe

# What becomes of what a layer's backward pass needs: it is kept, gate and up in 8 bits or not; computed again from the
# layer's input; or computed again from an input that waits in the host's memory.
Activations = Literal["keep", "keep8", "recompute", "offload"]
Arithmetic = Literal["plain", "16bit", "fp8", "int8"]
Base = Literal["none", "nf4", "int8"]
Precision = Literal["bf16", "fp16", "fp32"]
MethodKind = Literal["full", "lora", "qlora", "pretrain"]


def policy_name(activations: str, recomputed: int) -> str:
    """What is done with activations, in a word: `keep`, or `keep8-recompute12` where some layers are not kept."""
    return f"{activations}-recompute{recomputed}" if recomputed else activations


@dataclass(frozen=True)
class Layout:
    """One legal way to train: a point in the space the planner searches. Nothing in it is left open.

    `micro_batch_tokens` is the most tokens one forward and backward pass sees on one device; `devices` the world size,
    which is `replicas` (copies of the model, each with its own data) times the devices that share one copy. `variant`
    tells ways of one strategy apart (`grad`, `offload` and none of fsdp, `1f1b` and `interleaved` of pipeline,
    `offload` of zero). `shards`: devices of fsdp that hold the pieces of one copy between them; 0 are all.
    `cuts` are the layers of each pipeline stage in the model's order; a rank with `chunks` stages holds every
    (devices/replicas)-th of them.
    `arithmetic`: of the frozen products; but for `plain`, a layer is one fused operation (`plan.fused`), whose gate and
    up `keep8` keeps in 8 bits. In full training, of the products with trained weights (`plan.rounded`).
    `recomputed`: so many of the first layers compute again what the others `keep`.
    `graphs`: a micro-batch's passes are one CUDA graph, whose memory stays taken as long as the run lasts.
    `step_in_backward`: a parameter is changed as soon as its gradient is there, which is then let go of.
    """

    strategy: str
    method: MethodKind
    base: Base
    precision: Precision
    activations: Activations
    micro_batch_tokens: int
    device: Literal["cpu", "cuda"]
    devices: int = 1
    variant: str = ""
    replicas: int = 1
    chunks: int = 1
    cuts: tuple[int, ...] = ()
    arithmetic: Arithmetic = "plain"
    shards: int = 0
    recomputed: int = 0
    graphs: bool = False
    step_in_backward: bool = False

    def again(self, layers: int) -> int:
        """How many of so many layers are computed again in their backward pass."""
        return layers if self.activations in ("recompute", "offload") else min(self.recomputed, layers)

    @property
    def of_kept(self) -> Layout:
        """The same with every layer as those are that keep everything."""
        return replace(self, recomputed=0) if self.recomputed else self

    @property
    def of_again(self) -> Layout:
        """The same with every layer as those are that are computed again."""
        return replace(self, recomputed=0, activations="recompute") if self.recomputed else self

    @cached_property
    def of_one_device(self) -> Layout:
        """What of it a layer's bytes and work depend on, whichever device has it: alike in that they cost the same."""
        return Layout(
            "single", self.method, self.base, self.precision, self.activations, self.micro_batch_tokens, self.device,
            variant=self.variant if self.strategy == "single" else "",
            arithmetic=self.arithmetic, recomputed=self.recomputed, graphs=self.graphs,
            step_in_backward=self.step_in_backward,
        )  # fmt: skip

    @property
    def policy(self) -> str:
        """What is done with activations, in a word."""
        return policy_name(self.activations, self.recomputed)

    @property
    def shared_by(self) -> int:
        """Devices that a strategy divides one copy of the weights among."""
        return self.shards or self.devices

    @property
    def in_8_bits(self) -> bool:
        """Whether products with the layers' weights are computed in 8 bits."""
        return self.arithmetic in ("fp8", "int8")

    @property
    def ranks_per_replica(self) -> int:
        """Devices that share one copy of the model's work."""
        return self.devices // self.replicas

    @property
    def processes(self) -> int:
        """Processes that train: one for each device, or one that splits the layers over its devices itself."""
        return 1 if self.strategy == "model_parallel" else self.devices

    @property
    def way(self) -> str:
        """The strategy with its variant: `single`, `pipeline-1f1b` or, with two copies, `pipeline-1f1b-dp2`; two copies
        in four pieces each are `fsdp-2x4`.
        """
        copies = f"dp{self.replicas}" if self.strategy in ("pipeline", "tensor") and self.replicas > 1 else ""
        if self.shards:
            copies = f"{self.devices // self.shards}x{self.shards}"
        return "-".join(part for part in (self.strategy, self.variant, copies) if part)

    @property
    def name(self) -> str:
        """A short name for tables, for example `single/qlora/keep/4096`."""
        arithmetic = "" if self.arithmetic == "plain" else f"/{self.arithmetic}"
        return f"{self.way}/{self.method}{arithmetic}/{self.policy}/{self.micro_batch_tokens}"


@dataclass(frozen=True)
class DataFacts:
    """What the planner must know of the data: counts of the training split, and of its longest example in tokens."""

    examples: int
    tokens: int
    longest: int
    valid_examples: int = 0


@dataclass(frozen=True)
class Decision:
    """A value the planner chose for a recipe field that was left open, and why, in a sentence."""

    path: str
    value: Any
    why: str


@dataclass(frozen=True)
class Speed:
    """How fast a layout is predicted to be. `low` and `high` bound tokens/s; `parts` are seconds of one step by kind of
    work on the busiest device (host launches and communication count only as far as nothing hides them); `idle` is each
    device's share of the step without work; `mfu` the share of the devices' peak rate spent on arithmetic that training
    cannot do without. `source` says where the rates come from.
    """

    step_seconds: float
    tokens_per_second: float
    low: float
    high: float
    micro_batches: int
    mfu: float = 0.0
    idle: tuple[float, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)
    source: str = "table"


@dataclass(frozen=True)
class Candidate:
    """A layout and what it costs. Bytes are per device; `memory` holds the items of the peak on the device that is
    fullest for its size, which sum to it. `devices` has the items of every device (empty: there is one), `phases` the
    peak of each phase of a run on the fullest, `host` the items of `host_bytes`. `built` is False for a way that the
    engine cannot run yet: it is shown and never chosen.
    """

    layout: Layout
    memory: dict[str, int]
    host_bytes: int
    fits: bool
    why: tuple[str, ...] = ()
    devices: tuple[dict[str, int], ...] = ()
    phases: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    speed: Speed | None = None
    trained_parameters: int = 0
    global_batch_tokens: int = 0
    built: bool = True

    @property
    def device_peaks(self) -> tuple[int, ...]:
        """Predicted peak of allocated bytes, device by device."""
        return tuple(sum(items.values()) for items in self.devices) or (self.peak_bytes,)

    @property
    def step_bytes(self) -> int:
        """Predicted peak of allocated bytes of a training step on the fullest device: with CUDA graphs, less than what
        a validation reaches beside their memory.
        """
        return max(sum(items.values()) - items.get("graphs", 0) for items in self.devices or (self.memory,))

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of allocated bytes on the fullest device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What will run: the effective recipe (nothing training needs is left open), the layout, its cost, the reasons."""

    recipe: Recipe
    chosen: Candidate
    decisions: tuple[Decision, ...] = ()
    rivals: tuple[Candidate, ...] = ()
    hardware: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        """The layout that runs."""
        return self.chosen.layout

    def save(self, path: Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(path, {"version": 1, **asdict(self), "recipe": self.recipe.model_dump(mode="json")})

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            PlanError: the file is missing, not a plan, or of another version.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("version") != 1:
                raise ValueError("version")
            return cls(
                recipe=Recipe.model_validate_json(json.dumps(value["recipe"])),
                chosen=_candidate(value["chosen"]),
                decisions=tuple(Decision(**d) for d in value["decisions"]),
                rivals=tuple(_candidate(c) for c in value["rivals"]),
                hardware=value["hardware"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(
                tr("{path} is not a plan this version can read.", path=path),
                remedy=tr("Plan again with `kitaeru train RECIPE.yaml`."),
            ) from error


def _candidate(value: dict[str, Any]) -> Candidate:
    layout = dict(value["layout"])
    layout.pop("packed_experts", None)  # of plans from before experts were always packed
    layout["cuts"] = tuple(layout.get("cuts", ()))
    speed = value.get("speed")
    if speed is not None:
        speed = Speed(**{**speed, "idle": tuple(speed["idle"])})
    changed = {"layout": Layout(**layout), "why": tuple(value["why"]), "devices": tuple(value.get("devices", ()))}
    return Candidate(**{**value, **changed, "speed": speed})
