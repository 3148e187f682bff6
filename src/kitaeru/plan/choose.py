"""The choice: every legal layout is priced in bytes and seconds, and the fastest that fits with a margin is taken.

Candidates are the methods the recipe leaves open, the ways to use the devices, what is done with activations, and how
many tokens a micro-batch has. A way that the engine cannot run yet is priced and shown, and never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kitaeru.errors import PlanError
from kitaeru.hardware import Hardware
from kitaeru.i18n import tr
from kitaeru.plan import fused
from kitaeru.plan.activations import cast_bytes, input_bytes, one_layer_bytes
from kitaeru.plan.calibrate import Profile, own_profile
from kitaeru.plan.decide import decide_learning, default_seq_len, fill
from kitaeru.plan.deepspeed import offloads, read_own
from kitaeru.plan.host import host_items
from kitaeru.plan.layouts import (
    BY_LAYER,
    DISK,
    Arrangement,
    activation_policies,
    arithmetic_for,
    arrangements,
    illegal,
    is_built,
    waits_to_be_asked,
    ways,
)
from kitaeru.plan.nearest import no_layout, not_legal
from kitaeru.plan.problem import Problem, free_bytes, global_tokens, needed_bytes, needed_per_byte, setting_of, state
from kitaeru.plan.ranks import Items, phase_peaks, rank_items
from kitaeru.plan.reasons import decide_layout, why_chosen, why_lost
from kitaeru.plan.speed import Load, Pace, cuts_for, layer_on, pace, speed_of, step
from kitaeru.plan.stored import trained_parameters, trains_from_ram
from kitaeru.plan.types import Base, Candidate, DataFacts, Layout, MethodKind, Plan, Speed
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

__all__ = ["Survey", "default_seq_len", "make_plan", "survey"]

# Layouts within this of the fastest count as equally fast, and the simplest of them is taken.
TIE = 0.02
# How many times as fast activations in RAM must be to be taken: nothing must go wrong there.
OFFLOAD_GAIN = 1.1
# The same of weights that change in the backward pass: a gradient that is not finite cannot be skipped.
IN_BACKWARD_GAIN = 1.05
# CUDA graphs are taken where they make a step shorter by so much: they hold on to memory.
GRAPH_GAIN = 1.03
STAGED = ("pipeline", "model_parallel")
# Items of RAM that make a layout lean on it.
OFFLOADED = ("optimizer", "activations")
# How often layers are moved from a device that is too full to one that is not.
MOVES = 12

_SIZES = tuple(sorted({base << shift for base in (256, 384) for shift in range(13)}))


def make_plan(recipe: Recipe, hardware: Hardware, shape: ModelShape, facts: DataFacts | None = None) -> Plan:
    """What will run: `recipe` with nothing left open, the layout, its cost, and why each value was chosen.

    The same arguments give the same plan. Without `facts` the longest example is taken to be `data.seq_len`.

    Raises:
        PlanError: no layout of this recipe is legal, built and fits; the remedy names the nearest one that does.
    """
    found = survey(recipe, hardware, shape, facts)
    if found.plan is None:
        raise found.refusal
    return found.plan


@dataclass(frozen=True)
class Survey:
    """Everything the planner found: the best of each way (`candidates`, ranked), the plan made of the chosen one, and
    the ways that are impossible with the reason. `plan` is None when only ways that are not built yet would fit;
    `refusal` then says what is missing.
    """

    problem: Problem
    candidates: tuple[Candidate, ...]
    impossible: dict[str, str]
    plan: Plan | None
    refusal: PlanError


def survey(recipe: Recipe, hardware: Hardware, shape: ModelShape, facts: DataFacts | None = None) -> Survey:
    """Price every layout and choose.

    Raises:
        PlanError: no layout is legal, or not one would fit, built or not.
    """
    problem = state(recipe, hardware, shape, facts)
    pricing = Pricing(problem)
    candidates = pricing.price()
    usable = [c for c in candidates if c.fits and c.built and not waits_to_be_asked(c.layout.strategy, recipe)]
    if not usable:
        refusal = no_layout(
            problem, candidates, lambda other: Pricing(state(other, hardware, shape, facts), built_only=True).price()
        )
        if not any(candidate.fits for candidate in candidates):
            raise refusal
        others = [replace(c, why=(why_lost(problem, c, None),)) for c in _best_of_each(candidates, None)]
        return Survey(problem, _ranked(pricing.finished(others), None), pricing.impossible, None, refusal)
    chosen = choose(usable)
    shown = _best_of_each(candidates, chosen)
    rivals = pricing.finished(replace(c, why=(why_lost(problem, c, chosen),)) for c in shown if c is not chosen)
    (chosen,) = pricing.finished([chosen])
    faster = next((c for c in rivals if c.fits and c.built and _seconds(c) < 0.9 * _seconds(chosen)), None)
    chosen = replace(chosen, why=why_chosen(problem, chosen, pricing.link(chosen.layout), faster))
    learning = decide_learning(recipe, chosen.layout.method, problem.schedule, facts, on_cpu=problem.device is None)
    decisions = (*decide_layout(problem, chosen), *learning)
    could_run = tuple(rival for rival in rivals if rival.built)
    plan = Plan(fill(recipe, decisions), chosen, decisions, could_run, hardware.to_dict())
    return Survey(problem, _ranked((chosen, *rivals), chosen), pricing.impossible, plan, PlanError(""))


def _ranked(candidates: Sequence[Candidate], chosen: Candidate | None) -> tuple[Candidate, ...]:
    """The chosen one, the others that fit, the rest; the fastest first."""
    return tuple(sorted(candidates, key=lambda c: (c is not chosen, not c.fits, _seconds(c))))


# --- pricing ----------------------------------------------------------------------------------------------------------


class Pricing:
    """Prices the layouts of one problem. `impossible` has the reason for each way that is not legal."""

    def __init__(self, problem: Problem, *, built_only: bool = False) -> None:
        self.problem = problem
        self.built_only = built_only
        self._paces: dict[tuple[int, int, str], Pace] = {}
        self.impossible: dict[str, str] = {}
        self._fastest: dict[tuple[str, str], float] = {}  # seconds of the best that fits, by method and base
        # A described machine is not this one: its cards may be of the same kind and cooled otherwise.
        self.profile: Profile | None = None if problem.hardware.described else own_profile()

    def price(self) -> list[Candidate]:
        """Every legal layout with its cost, in the order of preference of methods.

        Raises:
            PlanError: not one layout is legal.
        """
        candidates: list[Candidate] = []
        for method, base in ways(self.problem.recipe):
            for arrangement in self._arrangements():
                candidates += self._ways(list(self._layouts(arrangement, method, base)))
        possible = {f"{c.layout.way}/{c.layout.method}" for c in candidates}
        if not candidates:
            raise not_legal(self.problem, list(dict.fromkeys(self.impossible.values())))
        self.impossible = {way: reason for way, reason in self.impossible.items() if way not in possible}
        return candidates

    def _ways(self, rows: Sequence[Sequence[Layout]]) -> list[Candidate]:
        """All that may be done with activations, from what is fastest to what takes least, until something fits with
        the largest micro-batch; between keeping and recomputing everything, as few layers computed again as will do.
        """
        candidates: list[Candidate] = []
        whole = False
        for i, row in enumerate(rows):
            policy = row[0].activations
            # None is any faster, so there is no need of its room; of one device's ways what it would cost is shown.
            if whole and (policy in ("keep8", "offload") or (policy == "recompute" and row[0].strategy in STAGED)):
                continue
            found = list(self._sizes(row))
            fitting = {c.layout.micro_batch_tokens for c in found if c.fits}
            candidates += found
            if policy == "recompute" and i and fitting and not whole:
                candidates += self._some(rows[i - 1], max(fitting))
            whole = any(self._fits_whole(c) for c in found if c.layout.micro_batch_tokens == row[-1].micro_batch_tokens)
        return candidates

    def _some(self, row: Sequence[Layout], most: int) -> Iterator[Candidate]:
        """Layouts that compute some layers again and keep the others, of micro-batches of at most so many tokens: the
        fewest layers that fit, from the largest micro-batch down as long as smaller ones are faster.
        """
        if row[0].strategy not in BY_LAYER or row[0].variant == DISK or trains_from_ram(row[0]):
            return
        best = float("inf")
        for layout in reversed(row):
            if layout.micro_batch_tokens > most:
                continue
            found = [c for c in map(self._fewest, dict.fromkeys((layout, self._lean(layout)))) if c is not None]
            fastest = min(map(_seconds, found), default=float("inf"))
            if not found or fastest > best:
                return
            best = fastest
            yield from found

    def _fewest(self, kept: Layout) -> Candidate | None:
        """With as few layers computed again as fit; None where none need be, or not even all but one are enough."""
        layers = self.problem.shape.layers
        load = self._load(kept)
        missing = -min(self._room(kept, self._devices(kept, load, {})))
        if missing <= 0:
            return None
        saved = one_layer_bytes(kept, self.problem.shape, load.setting) - input_bytes(kept, self.problem.shape)
        if kept.step_in_backward:  # which lets go of a layer's copies in 16 bits too
            saved += cast_bytes(kept, self.problem.shape, load.setting.lora) // layers
        count = max(1, int(missing / needed_per_byte(kept) / max(1, saved)))
        for recomputed in range(count, min(count + 4, layers)):
            candidate = self._candidate(replace(kept, recomputed=recomputed))
            if candidate.fits and candidate.layout.step_in_backward == kept.step_in_backward:
                return candidate
        return None

    def finished(self, candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
        """Candidates with all that is shown of them: their range of speed and the peaks of every phase."""
        return tuple(replace(c, speed=self._speed(c.layout), phases=self._phases(c)) for c in candidates)

    def link(self, layout: Layout) -> str:
        """What joins the devices of a layout, for people."""
        return self._pace(layout, "likely").link.name

    def work(self, layout: Layout) -> tuple[Load, Pace]:
        """What a step of a layout does, and the likely rates it does it at."""
        return self._load(layout), self._pace(layout, "likely")

    def _pace(self, layout: Layout, case: str) -> Pace:
        key = (layout.devices, layout.shards, case)
        if key not in self._paces:
            problem = self.problem
            found = [problem.device_of(rank, layout) for rank in range(layout.devices)]
            devices = [device for device in found if device is not None]
            self._paces[key] = pace(layout, problem.hardware, devices, case, self.profile)
        return self._paces[key]

    def _arrangements(self) -> list[Arrangement]:
        problem = self.problem
        group, hosts = problem.recipe.limits.split_over, problem.hardware.hosts
        within = group if group is not None else problem.world // hosts if hosts > 1 else None
        found = list(arrangements(problem.recipe.strategy, problem.world, within))
        if hosts > 1:
            found = [a for a in found if a.strategy != "model_parallel"]
            self.impossible.setdefault("model_parallel", tr("One process cannot split its layers over several hosts."))
        if self.built_only:
            found = [a for a in found if not waits_to_be_asked(a.strategy, problem.recipe)]
        if problem.recipe.limits.ds_config is not None:
            wanted = offloads(read_own(Path(problem.recipe.limits.ds_config)))
            found = [a for a in found if a.variant == wanted]
        if problem.device is None and problem.recipe.limits.variant is None:  # everything is in RAM already
            found = [a for a in found if (a.strategy, a.variant) != ("single", "offload")]
        if problem.recipe.limits.offload_folder is None:
            found = [a for a in found if a.variant != DISK]
        if problem.recipe.limits.devices is not None:
            found = [a for a in found if a.devices == problem.world]
        if problem.recipe.strategy == "auto" and problem.world == 1:
            found = [a for a in found if a.strategy == "single"]
        if problem.recipe.limits.variant is not None:
            found = [a for a in found if a.variant == problem.recipe.limits.variant]
            if not found:
                why = tr(
                    "No way to use these devices has the variant {variant}.", variant=problem.recipe.limits.variant
                )
                self.impossible.setdefault("variant", why)
        if group is not None:
            found = [a for a in found if a.split_over == group]
            if not found:
                why = tr("{count} devices cannot be shared out in groups of {size}.", count=problem.world, size=group)
                self.impossible.setdefault("split_over", why)
        return found

    def _sizes(self, row: Sequence[Layout]) -> Iterator[Candidate]:
        """Layouts that differ by the size of their micro-batch alone, as many as may win: the largest that fits is the
        fastest, since fewer micro-batches launch fewer kernels and unpack fewer weights; a pipeline may want more.
        """
        yield from self._stages(row) if row[0].strategy in STAGED else self._largest(row)

    def _stages(self, row: Sequence[Layout]) -> Iterator[Candidate]:
        """All that fit, and the largest."""
        full = False
        for layout in row:
            if full and layout is not row[-1]:
                continue
            reason = self._illegal(layout)
            if reason is not None:
                self.impossible.setdefault(f"{layout.way}/{layout.method}", reason)
                continue
            if self.built_only and self._slower(layout):
                continue
            candidate = self._candidate(layout)
            full = not candidate.fits
            self._remember(candidate)
            yield candidate

    def _largest(self, row: Sequence[Layout]) -> Iterator[Candidate]:
        """The largest layout of a row that fits, and what was looked at to find it by halves: the larger one is, the
        more it needs, but for the last one, in which no gradients wait.
        """
        reason = self._illegal(row[0])  # of what goes through all layers no size is illegal
        if reason is not None:
            self.impossible.setdefault(f"{row[0].way}/{row[0].method}", reason)
            return
        candidate = self._candidate(row[-1])
        low, high = 0, 0 if self._fits_whole(candidate) else len(row) - 1
        while True:
            self._remember(candidate)
            yield candidate
            if low >= high:
                return
            middle = (low + high) // 2
            candidate = self._candidate(row[middle])
            low, high = (middle + 1, high) if candidate.fits else (low, middle)

    def _remember(self, candidate: Candidate) -> None:
        kind = (candidate.layout.method, candidate.layout.base)
        self._fastest[kind] = min(_seconds(candidate), self._fastest.get(kind, float("inf")))

    def _slower(self, layout: Layout) -> bool:
        """Whether stages could not beat what fits already even if none of them ever waited."""
        best = self._fastest.get((layout.method, layout.base), float("inf"))
        if best == float("inf"):
            return False
        load = self._load(layout)
        count, shape = load.micro_batches(layout), self.problem.shape
        full = replace(layout, micro_batch_tokens=load.tokens_in(layout))
        fastest = max(self._pace(layout, "likely").devices, key=lambda rates: rates.gemm)
        layer = layer_on(full, shape, load, fastest)
        seconds = shape.layers * (layer.forward + layer.backward).seconds + layer.head.seconds
        at_once = layout.ranks_per_replica if layout.strategy == "pipeline" else 1
        return count * seconds / at_once > best * (1 - TIE)

    def _layouts(self, arrangement: Arrangement, method: MethodKind, base: Base) -> Iterator[list[Layout]]:
        """The layouts of one arrangement and method, in rows that differ by the size of a micro-batch: one for each
        thing that can be done with activations.
        """
        problem = self.problem
        device: Literal["cuda", "cpu"] = "cpu" if problem.device is None else "cuda"
        if problem.recipe.limits.device == "cuda":
            device = "cuda"
        sizes = micro_batch_sizes(problem, arrangement.replicas)
        bare = Layout(
            arrangement.strategy, method, base, problem.precision, "keep", sizes[0], device, arrangement.devices,
            arrangement.variant,
        )  # fmt: skip
        arithmetic = arithmetic_for(problem.recipe, bare, problem.device, problem.shape)
        recomputed = problem.recipe.limits.recomputed_layers or 0
        eight = arithmetic in ("fp8", "int8") and method in ("lora", "qlora")
        for activations in activation_policies(problem.recipe, eight=eight):
            if activations == "offload" and device == "cpu" and not problem.recipe.limits.offload_activations:
                continue
            row = [
                Layout(
                    arrangement.strategy, method, base, problem.precision, activations, tokens, device,
                    arrangement.devices, arrangement.variant, arrangement.replicas, arrangement.chunks,
                    arithmetic=arithmetic,
                    shards=arrangement.shards, recomputed=recomputed, graphs=bool(problem.recipe.train.cuda_graphs),
                    step_in_backward=bool(problem.recipe.train.step_in_backward),
                )
                for tokens in sizes
            ]  # fmt: skip
            if is_built(row[0]) or not self.built_only:
                yield row

    def _illegal(self, layout: Layout) -> str | None:
        problem = self.problem
        devices = {problem.device_of(rank, layout) for rank in range(layout.devices)}
        count = self._load(layout).micro_batches(layout)
        reasons = (illegal(layout, problem.recipe, device, problem.shape, count) for device in devices)
        return next((reason for reason in reasons if reason), None)

    def _load(self, layout: Layout) -> Load:
        problem = self.problem
        setting = setting_of(problem, layout)
        return Load(global_tokens(problem), problem.typical, setting, problem.even, problem.short)

    def _candidate(self, layout: Layout) -> Candidate:
        """A layout with its cost; where it does not fit, with weights that change in the backward pass; with CUDA
        graphs where they are left open, fit and are clearly faster.
        """
        plain, recipe = self._priced(layout), self.problem.recipe
        if not plain.fits:
            lean = self._lean(layout)
            return plain if lean is layout else self._priced(lean)
        if recipe.train.cuda_graphs is not None or not fused.replays(layout, recipe):
            return plain
        graphs = self._priced(replace(layout, graphs=True))
        return graphs if graphs.fits and _seconds(graphs) * GRAPH_GAIN < _seconds(plain) else plain

    def _lean(self, layout: Layout) -> Layout:
        """The same without all gradients at once, where that is left open and legal."""
        train, lean = self.problem.recipe.train, replace(layout, step_in_backward=True)
        if train.step_in_backward is not None or train.max_grad_norm or self._illegal(lean) is not None:
            return layout
        return lean

    def _fits_whole(self, candidate: Candidate) -> bool:
        """Whether it fits, with all gradients at once unless the recipe wants otherwise."""
        lean = candidate.layout.step_in_backward and self.problem.recipe.train.step_in_backward is None
        return candidate.fits and not lean

    def _priced(self, layout: Layout) -> Candidate:
        problem = self.problem
        load = self._load(layout)
        likely = self._pace(layout, "likely")
        if layout.strategy in STAGED:
            cuts = cuts_for(layout, problem.shape, load, likely)
            layout, devices = self._cut(replace(layout, cuts=cuts), load)
        else:
            devices = self._devices(layout, load, {})
        host = host_items(layout, problem.shape, load.setting)
        fits = self._fits(layout, devices) and self._host_fits(layout, host)
        speed = None
        if fits:
            found = step(layout, problem.shape, load, likely)
            rate = load.global_tokens / found.seconds
            speed = Speed(found.seconds, rate, rate, rate, load.micro_batches(layout))
        return Candidate(
            layout=layout,
            memory=devices[self._fullest(layout, devices)],
            host_bytes=sum(host.values()),
            fits=fits,
            devices=devices,
            host=host,
            speed=speed,
            trained_parameters=trained_parameters(layout, problem.shape, problem.recipe.lora),
            global_batch_tokens=load.global_tokens,
            built=is_built(layout),
        )

    def _devices(self, layout: Layout, load: Load, known: dict[tuple[int, int], Items]) -> tuple[Items, ...]:
        """Items of every device; ranks that hold the same part are counted once, and not again if `known`."""
        ranks = layout.ranks_per_replica if layout.strategy in STAGED else 1
        count, parts = load.micro_batches(layout), []
        for rank in range(ranks):
            key = (rank, sum(layout.cuts[rank::ranks]))
            if key not in known:
                known[key] = rank_items(layout, self.problem.shape, load.setting, rank, count)
            parts.append(known[key])
        return tuple(parts[rank % ranks] for rank in range(layout.devices))

    def _room(self, layout: Layout, devices: Sequence[Items]) -> list[int]:
        """What would stay free on each device, the margin counted as taken; negative where it does not fit."""
        return [
            free_bytes(self.problem, layout, rank) - needed_bytes(layout, sum(items.values()))
            for rank, items in enumerate(devices)
        ]

    def _fits(self, layout: Layout, devices: Sequence[Items]) -> bool:
        return min(self._room(layout, devices)) >= 0

    def _fullest(self, layout: Layout, devices: Sequence[Items]) -> int:
        room = self._room(layout, devices)
        return room.index(min(room))

    def _host_fits(self, layout: Layout, host: dict[str, int]) -> bool:
        """RAM is looked at where a layout leans on it: one device alone takes what any program takes."""
        leans = layout.device == "cuda" and (layout.strategy == "fsdp" or not host.keys().isdisjoint(OFFLOADED))
        return not leans or sum(host.values()) <= self.problem.hardware.host_free_bytes

    def _cut(self, layout: Layout, load: Load) -> tuple[Layout, tuple[Items, ...]]:
        """Move layers from the stage that is too full to the one with most room, as long as that helps."""
        known: dict[tuple[int, int], Items] = {}
        devices = self._devices(layout, load, known)
        for _ in range(MOVES):
            room = self._room(layout, devices)
            if min(room) >= 0:
                break
            ranks = layout.ranks_per_replica
            by_rank = [min(room[rank::ranks]) for rank in range(ranks)]
            full, empty = by_rank.index(min(by_rank)), by_rank.index(max(by_rank))
            cuts = list(layout.cuts)
            source = max(range(full, len(cuts), ranks), key=lambda stage: cuts[stage])
            target = min(range(empty, len(cuts), ranks), key=lambda stage: cuts[stage])
            if by_rank[empty] <= 0 or full == empty or cuts[source] <= 1:
                break
            cuts[source], cuts[target] = cuts[source] - 1, cuts[target] + 1
            layout = replace(layout, cuts=tuple(cuts))
            devices = self._devices(layout, load, known)
        return layout, devices

    def _speed(self, layout: Layout) -> Speed:
        problem = self.problem
        likely, low, high = (self._pace(layout, case) for case in ("likely", "low", "high"))
        return speed_of(layout, problem.shape, self._load(layout), (likely, low, high))

    def _phases(self, candidate: Candidate) -> dict[str, int]:
        layout, load = candidate.layout, self._load(candidate.layout)
        ranks = layout.ranks_per_replica if layout.strategy in STAGED else 1
        rank = candidate.devices.index(candidate.memory) % ranks
        return phase_peaks(layout, self.problem.shape, load.setting, rank, load.micro_batches(layout))


def micro_batch_sizes(problem: Problem, replicas: int = 1) -> list[int]:
    """Sizes to try, in tokens: from the longest example to a replica's share of the global batch, in steps of a half or
    a third.
    """
    recipe = problem.recipe
    if recipe.limits.micro_batch_tokens is not None:
        return [recipe.limits.micro_batch_tokens]
    least = problem.least_micro_batch
    if not recipe.data.packing:
        return [least]
    whole = -(-global_tokens(problem) // replicas)
    if recipe.train.step_in_backward:  # which takes one micro-batch a step
        return [max(least, whole)]
    most = max(least, min(problem.usual_micro_batch, whole))
    return sorted({least, most, *(size for size in _SIZES if least < size < most)})


# --- choosing ---------------------------------------------------------------------------------------------------------


def choose(usable: Sequence[Candidate]) -> Candidate:
    """Of those that fit and are built: the preferred method, then the fastest, the simplest, the fewest bytes.

    The preferred method is the first that fits whole on a device (`single` or `ddp`); where none does, all compete. A
    way that keeps weights or the optimizer in RAM is taken where no other fits; one with activations there, and one
    that changes weights in the backward pass, if it is clearly faster (`OFFLOAD_GAIN`, `IN_BACKWARD_GAIN`).
    """
    pool = list(usable)
    for candidate in usable:
        if candidate.layout.strategy in ("single", "ddp") and not candidate.layout.variant:
            kind = (candidate.layout.method, candidate.layout.base)
            pool = [c for c in usable if (c.layout.method, c.layout.base) == kind]
            break
    pool = [c for c in pool if not c.layout.variant.startswith("offload")] or pool
    pool = _safer(pool, lambda layout: layout.step_in_backward, IN_BACKWARD_GAIN)
    return _fastest(_safer(pool, lambda layout: layout.activations == "offload", OFFLOAD_GAIN))


def _safer(pool: list[Candidate], risky: Callable[[Layout], bool], gain: float) -> list[Candidate]:
    """Without the risky ones, unless the fastest is one and that many times as fast as any other."""
    fastest, others = _fastest(pool), [c for c in pool if not risky(c.layout)]
    if not risky(fastest.layout) or not others or _seconds(_fastest(others)) > gain * _seconds(fastest):
        return pool
    return others


def _fastest(pool: Sequence[Candidate]) -> Candidate:
    """The fastest; among those nearly as fast the simplest (all layers alike), and of one way the fastest again."""
    order = list(dict.fromkeys(c.layout.way for c in pool))
    best = min(_seconds(c) for c in pool)
    tied = [c for c in pool if _seconds(c) <= best * (1 + TIE)]
    return min(
        tied,
        key=lambda c: (order.index(c.layout.way), c.layout.recomputed > 0, round(_seconds(c), 9), c.peak_bytes),
    )


def _seconds(candidate: Candidate) -> float:
    return candidate.speed.step_seconds if candidate.speed else float("inf")


def _best_of_each(candidates: Sequence[Candidate], chosen: Candidate | None) -> list[Candidate]:
    """The best of every way that was open (the smallest where none fits): the fastest of each method and strategy, one
    that is built and one that is not; of the chosen strategy also the best of what else can be done with activations,
    and a larger one that does not fit.
    """
    groups: dict[tuple[str, ...], list[Candidate]] = {}
    own = chosen.layout.way if chosen else "single"
    for candidate in candidates:
        layout = candidate.layout
        own_policy = (layout.activations if not layout.recomputed else "some") if layout.way == own else ""
        key = (layout.method, layout.way, own_policy, str(candidate.built))
        groups.setdefault(key, []).append(candidate)
    found: list[Candidate] = [] if chosen is None else [chosen]
    for group in groups.values():
        if any(c is chosen for c in group) and chosen is not None:
            larger = [c for c in group if c.layout.micro_batch_tokens > chosen.layout.micro_batch_tokens and not c.fits]
            found += [min(larger, key=lambda c: c.peak_bytes)] if larger else []
            continue
        fitting = [c for c in group if c.fits]
        found.append(_fastest(fitting) if fitting else min(group, key=lambda c: (c.peak_bytes, c.host_bytes)))
    return found
