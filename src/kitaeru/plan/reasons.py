"""Why each value and layout was chosen, in plain sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kitaeru.i18n import tr
from kitaeru.plan.decide import decide_seq_len
from kitaeru.plan.layouts import illegal, waits_to_be_asked
from kitaeru.plan.memory import memory_items
from kitaeru.plan.problem import GB, Problem, free_bytes, global_tokens, needed_bytes, setting_of
from kitaeru.plan.ranks import rank_items
from kitaeru.plan.stored import compute_bytes, packs_experts, trained_parameters, trains_all, trains_from_ram
from kitaeru.plan.types import Candidate, Decision, Layout
from kitaeru.recipe.types import Optimizer

# Less is not spoken of.
WORTH_GB = 0.1


def decide_layout(problem: Problem, chosen: Candidate) -> Iterator[Decision]:
    """Decisions about layout and device, for the fields the recipe leaves open."""
    recipe, layout = problem.recipe, chosen.layout
    yield from decide_seq_len(recipe, problem.shape)
    if recipe.limits.device is None:
        yield Decision("limits.device", layout.device, _why_device(problem))
    if recipe.strategy == "auto":
        yield Decision("strategy", layout.strategy, _why_strategy(problem, chosen))
    if recipe.train.precision == "auto":
        yield Decision("train.precision", layout.precision, _why_precision(problem))
    if recipe.train.arithmetic == "auto":
        yield Decision("train.arithmetic", layout.arithmetic, _why_arithmetic(problem, layout))
    if recipe.train.cuda_graphs is None:
        yield Decision("train.cuda_graphs", layout.graphs, _why_graphs(problem, chosen))
    if recipe.train.step_in_backward is None:
        yield Decision("train.step_in_backward", layout.step_in_backward, _why_in_backward(problem, chosen))
    if recipe.method == "auto":
        yield Decision("method", layout.method, _why_method(problem, layout))
    if recipe.train.optimizer == "auto":
        optimizer = setting_of(problem, layout).optimizer
        yield Decision("train.optimizer", optimizer, _why_optimizer(problem, chosen, optimizer))
    if recipe.model.quantize == "auto":
        yield Decision("model.quantize", layout.base, _why_base(layout))
    if recipe.limits.micro_batch_tokens is None:
        yield Decision("limits.micro_batch_tokens", layout.micro_batch_tokens, _why_micro(problem, chosen))
    if recipe.limits.checkpointing is None:
        again = layout.again(problem.shape.layers)
        why = _why_activations(problem, chosen)
        yield Decision("limits.checkpointing", again > 0, why)
        if layout.recomputed and recipe.limits.recomputed_layers is None:
            yield Decision("limits.recomputed_layers", layout.recomputed, why)
    if layout.activations == "offload" and recipe.limits.offload_activations is None:
        yield Decision("limits.offload_activations", True, _why_offload(chosen))
    if recipe.limits.threads is None and layout.device == "cpu":
        cores = problem.hardware.cpu_cores
        if layout.devices == 1:
            yield Decision("limits.threads", cores, tr("One for each of the {count} cores.", count=cores))
        else:
            why = tr("{devices} processes share {count} cores.", devices=layout.devices, count=cores)
            yield Decision("limits.threads", max(1, cores // layout.devices), why)


def _why_strategy(problem: Problem, chosen: Candidate) -> str:
    if problem.world == 1:
        return tr("There is one device.")
    if chosen.layout.devices == 1:
        return tr("One device is as fast as all of them for batches of this size, or no other way is built or fits.")
    return tr(
        "The fastest that fits on {count} devices: about {rate} tokens/s.",
        count=chosen.layout.devices,
        rate=f"{chosen.speed.tokens_per_second:,.0f}" if chosen.speed else "",
    )


def _why_device(problem: Problem) -> str:
    if problem.device is None:
        return tr("There is no GPU here.")
    size = problem.device.memory_bytes / GB
    return tr("{device} with {size:.1f} GB is here.", device=problem.device.name, size=size)


def _why_precision(problem: Problem) -> str:
    if problem.device is None:
        return tr("A CPU is fastest and most exact in fp32.")
    if problem.precision == "bf16":
        return tr("{device} computes in bf16.", device=problem.device.name)
    return tr("{device} has no bf16; fp16 with a loss scaler is used.", device=problem.device.name)


def _why_method(problem: Problem, layout: Layout) -> str:
    weights = problem.shape.parameters() * (4 if layout.precision == "fp32" else 2) / GB
    if layout.method == "lora":
        return tr("The base needs {size:.3g} GB unquantised, and that fits.", size=weights)
    return tr("The base needs {size:.3g} GB unquantised, which leaves too little room; 4 bits fit.", size=weights)


def _why_optimizer(problem: Problem, chosen: Candidate, optimizer: Optimizer) -> str:
    if optimizer == "adamw":
        return tr("AdamW with both moments in 32 bits.")
    return tr(
        "AdamW's moments are held in 16 bits, rounded by chance so that small changes add up: in 32 bits everything "
        "would take {wide:.0f} GB of RAM, and {free:.0f} GB are free; so it takes {size:.0f} GB.",
        wide=(chosen.host_bytes + chosen.host.get("optimizer", 0)) / GB,
        free=problem.hardware.host_free_bytes / GB,
        size=chosen.host_bytes / GB,
    )


def _why_base(layout: Layout) -> str:
    if layout.base == "nf4":
        return tr("QLoRA stores the frozen base in 4 bits.")
    return tr("{method} works on weights that are not quantised.", method=layout.method)


def _why_micro(problem: Problem, chosen: Candidate) -> str:
    tokens = chosen.layout.micro_batch_tokens
    if tokens >= global_tokens(problem):
        return tr("The whole global batch goes through at once.")
    if tokens >= problem.usual_micro_batch:
        return tr("{tokens} tokens keep the device busy; more would only take memory.", tokens=tokens)
    if tokens == problem.least_micro_batch:
        return tr("It must hold the longest example, {tokens} tokens.", tokens=problem.longest)
    return tr(
        "The most that fits: {peak:.1f} GB of {free:.1f} GB at the peak.",
        peak=chosen.peak_bytes / GB,
        free=free_bytes(problem) / GB,
    )


def _arithmetic_sentences(layout: Layout) -> Iterator[str]:
    if layout.in_8_bits and trains_all(layout):
        yield tr(
            "Trained weights are multiplied in {kind}, forward and back; their own gradients are computed in 16 bits, "
            "as everything is with --set train.arithmetic=auto.",
            kind=layout.arithmetic.upper(),
        )
    elif layout.in_8_bits:
        yield tr(
            "Frozen weights are multiplied in {kind}; in 16 bits with --set train.arithmetic=16bit.",
            kind=layout.arithmetic.upper(),
        )


def _why_arithmetic(problem: Problem, layout: Layout) -> str:
    if layout.in_8_bits:
        return tr(
            "Frozen weights are multiplied in 8 bits, each layer in one operation; layers that lose too much are found "
            "before the first step and computed in 16. In 16 bits everywhere: --set train.arithmetic=16bit"
        )
    reason = illegal(replace(layout, arithmetic="int8"), problem.recipe, problem.device, problem.shape)
    if reason is None and trains_all(layout) and layout.device == "cuda":
        return tr(
            "Where every weight is trained, 8 bits are taken only when asked for: --set train.arithmetic=fp8 (int8 "
            "below compute capability 9.0)."
        )
    return reason or tr("The model's own code; fused kernels are for GPUs.")


def _why_graphs(problem: Problem, chosen: Candidate) -> str:
    layout = chosen.layout
    if layout.graphs:
        return tr(
            "Launched kernel by kernel, layers would wait for the host; as one CUDA graph they do not. What it takes "
            "stays taken, so validation needs {size:.1f} GB beside it.",
            size=chosen.memory.get("graphs", 0) / GB,
        )
    replayed = replace(layout, graphs=True)
    reason = illegal(replayed, problem.recipe, problem.device, problem.shape)
    if reason is not None:
        return reason
    peak = sum(rank_items(replayed, problem.shape, setting_of(problem, layout), 0, 1).values())
    need, free = needed_bytes(replayed, peak), free_bytes(problem, layout)
    if need > free:
        return tr(
            "What a CUDA graph takes stays taken while the run validates: that needs {need:.1f} GB, and {free:.1f} GB "
            "are free.",
            need=need / GB,
            free=free / GB,
        )
    return tr("Micro-batches are large enough that layers hardly wait for the host.")


def _graph_sentences(chosen: Candidate) -> Iterator[str]:
    if chosen.layout.graphs:
        yield tr(
            "The passes of a micro-batch are launched as one CUDA graph, so the GPU does not wait for the host; that "
            "takes {size:.1f} GB more. Without: --set train.cuda_graphs=false",
            size=chosen.memory.get("graphs", 0) / GB,
        )


def _why_in_backward(problem: Problem, chosen: Candidate) -> str:
    layout, size = chosen.layout, 4 * chosen.trained_parameters / GB
    if layout.step_in_backward:
        return tr(
            "All gradients at once would take {size:.1f} GB and do not fit, so each weight changes as soon as its "
            "gradient is there.",
            size=size,
        )
    micro_batches = chosen.speed.micro_batches if chosen.speed else 1
    lean = replace(layout, step_in_backward=True, graphs=False)
    reason = illegal(lean, problem.recipe, problem.device, problem.shape, micro_batches)
    if reason is None:
        return tr("All gradients, {size:.1f} GB, fit.", size=size)
    if layout.strategy != "single" or layout.variant or size < WORTH_GB:
        return reason
    return reason + " " + tr("Else up to {size:.1f} GB of gradients could be saved.", size=size)


def _in_backward_sentences(chosen: Candidate) -> Iterator[str]:
    if chosen.layout.step_in_backward:
        yield tr(
            "Each weight changes in the backward pass, as soon as its gradient is there: all gradients at once would "
            "take {size:.1f} GB. A gradient that is not finite ends the run. Without: "
            "--set train.step_in_backward=false",
            size=4 * chosen.trained_parameters / GB,
        )


def _why_activations(problem: Problem, chosen: Candidate) -> str:
    layout, shape = chosen.layout, problem.shape
    if layout.activations == "keep" and not layout.recomputed:
        kept = chosen.memory.get("activations", 0) / GB
        return tr("Everything the backward pass needs fits ({size:.1f} GB), so nothing is computed twice.", size=kept)
    items = memory_items(replace(layout, activations="keep", recomputed=0), shape, setting_of(problem, layout))
    if layout.recomputed:
        return tr(
            "Keeping everything would take {size:.1f} GB, so {count} of {layers} layers are computed twice instead.",
            size=sum(items.values()) / GB,
            count=layout.recomputed,
            layers=shape.layers,
        )
    if layout.activations == "keep8":
        return tr(
            "Gate and up are kept in 8 bits, so nothing is computed twice; in full it would take {size:.1f} GB.",
            size=sum(items.values()) / GB,
        )
    return tr(
        "Keeping everything would take {size:.1f} GB, so layers are computed twice instead.",
        size=sum(items.values()) / GB,
    )


def _why_offload(chosen: Candidate) -> str:
    wait = chosen.speed.parts.get("offload", 0.0) / chosen.speed.step_seconds if chosen.speed else 0.0
    return tr(
        "What goes into each layer waits in RAM ({size:.1f} GB): on the device it would not fit, or only with smaller "
        "micro-batches. The copies cost {share:.0%} of the time.",
        size=chosen.host.get("activations", 0) / GB,
        share=wait,
    )


def why_chosen(problem: Problem, chosen: Candidate, link: str = "", faster: Candidate | None = None) -> tuple[str, ...]:
    """What the chosen layout costs, how fast it is and what it trains, and what a person should know about the plan."""
    layout = chosen.layout
    trained = trained_parameters(layout, problem.shape, problem.recipe.lora)
    total = problem.shape.parameters() + (0 if trains_all(layout) else trained)
    rank = chosen.devices.index(chosen.memory) if chosen.memory in chosen.devices else 0
    sentences = [
        tr(
            "{peak:.1f} GB at the peak; {device} has {free:.1f} GB free.",
            peak=chosen.peak_bytes / GB,
            device=problem.device_name,
            free=free_bytes(problem, layout, rank) / GB,
        ),
        tr(
            "{trained:,} of {total:,} parameters are trained ({share:.2%}).",
            trained=trained,
            total=total,
            share=trained / total,
        ),
        *_speed_sentences(chosen),
        *_arithmetic_sentences(layout),
        *_graph_sentences(chosen),
        *_in_backward_sentences(chosen),
        *_sharing_sentences(problem, chosen, link),
        *([_why_offload(chosen)] if layout.activations == "offload" else []),
        *_ram_sentences(problem, chosen),
    ]
    if faster is not None and faster.layout.method != layout.method and faster.layout.base == "nf4":
        sentences.append(
            tr(
                "{name} would be {times:.1f} times as fast, on a less exact 4-bit base: --set method={method}",
                name=faster.layout.name,
                times=_seconds(chosen) / _seconds(faster),
                method=faster.layout.method,
            )
        )
    sentences += _experts(problem, layout)
    if not problem.shape.exact:
        sentences.append(
            tr("The family {family} is not known here: it is counted as a Llama.", family=problem.shape.family)
        )
    idle = 0 if problem.device is None else len(problem.hardware.devices) - layout.devices
    if idle > 0:
        sentences.append(tr("Other GPUs stay idle: {count}.", count=idle))
    return tuple(sentences)


def _speed_sentences(chosen: Candidate) -> Iterator[str]:
    speed = chosen.speed
    if speed is None:
        return
    values = {"rate": f"{speed.tokens_per_second:,.0f}", "low": f"{speed.low:,.0f}", "high": f"{speed.high:,.0f}"}
    if speed.source == "profile":
        yield tr("About {rate} tokens/s ({low} to {high}), from what was measured on this machine.", **values)
    elif chosen.layout.device == "cuda":
        yield tr("About {rate} tokens/s ({low} to {high}), from the table of GPUs: not measured here.", **values)
    else:
        yield tr("About {rate} tokens/s ({low} to {high}): a rough guess for a CPU.", **values)


def _sharing_sentences(problem: Problem, chosen: Candidate, link: str) -> Iterator[str]:
    """What crosses between devices in a step, and what that costs."""
    layout, speed = chosen.layout, chosen.speed
    if layout.devices == 1 or speed is None:
        return
    waits = sum(speed.parts.get(kind, 0.0) for kind in ("communication", "bubble", "offload"))
    base = (chosen.memory.get("weights", 0) + chosen.memory.get("quantization", 0)) / GB
    share = waits / speed.step_seconds
    if layout.strategy == "ddp":
        yield tr(
            "ddp: each device holds the {base:.1f} GB base, so nothing crosses {link} but {size:.0f} MB of gradients a "
            "step: {share:.2%} of the time.",
            base=base,
            link=link,
            size=4 * chosen.trained_parameters / 10**6,
            share=share,
        )
    elif layout.cuts:
        yield tr(
            "{way}: the stages have {cuts} layers; with {micro} micro-batches a step a device waits {share:.1%} of the "
            "time.",
            way=layout.way,
            cuts=" + ".join(map(str, layout.cuts)),
            micro=speed.micro_batches,
            share=share,
        )
    else:
        yield tr(
            "{way}: a device holds {base:.1f} GB of weights and waits {share:.1%} of the time for what crosses {link}.",
            way=layout.way,
            base=base,
            link=link,
            share=share,
        )
    if layout.shards:
        yield tr(
            "{copies} copies, each cut among {size} devices: between the copies only gradients cross, once a step.",
            copies=layout.devices // layout.shards,
            size=layout.shards,
        )
    if layout.strategy == "fsdp" and layout.variant == "offload" and not trains_all(layout):
        size = chosen.host.get("weights", 0) / GB
        yield tr("What is cut lies in RAM ({size:.0f} GB) and comes to the devices layer by layer.", size=size)


def _ram_sentences(problem: Problem, chosen: Candidate) -> Iterator[str]:
    """What full training keeps in RAM, and what of a step goes there."""
    layout, speed = chosen.layout, chosen.speed
    if not trains_from_ram(layout) or layout.device == "cpu" or speed is None:
        return
    items = {name: chosen.host.get(name, 0) / GB for name in ("weights", "gradients", "optimizer")}
    yield tr(
        "Weights ({weights:.0f} GB), gradients ({gradients:.0f} GB) and moments ({optimizer:.0f} GB) lie in RAM; with "
        "all else {all:.0f} GB of {free:.0f} GB that are free. Layers come to the device one at a time.",
        **items,
        all=chosen.host_bytes / GB,
        free=problem.hardware.host_free_bytes / GB,
    )
    yield tr(
        "Of a step of {seconds:.1f} s the optimizer takes {optimizer:.1f} s on the CPU, and {waits:.1f} s are waited "
        "for copies; a larger train.global_batch_tokens makes that count less.",
        seconds=speed.step_seconds,
        optimizer=speed.parts.get("optimizer", 0.0),
        waits=speed.parts.get("offload", 0.0),
    )
    optimizer = setting_of(problem, layout).optimizer
    if optimizer == "adamw_16bit" and problem.recipe.train.optimizer == "auto":
        yield _why_optimizer(problem, chosen, optimizer)


def why_lost(problem: Problem, rival: Candidate, chosen: Candidate | None) -> str:
    """Why a rival was not taken; without a chosen layout, why nothing is built that would do."""
    if not rival.fits:
        return _why_not_fit(problem, rival)
    if not rival.built:
        return tr("Fits, but is not built yet.")
    if waits_to_be_asked(rival.layout.strategy, problem.recipe):
        return tr(
            "Fits too; it needs DeepSpeed, so it is taken when asked for: --set strategy={name}",
            name=rival.layout.strategy,
        )
    if chosen is None:
        return ""
    if rival.layout.method != chosen.layout.method or rival.layout.base != chosen.layout.base:
        if rival.layout.base == "nf4":
            rate = f"{rival.speed.tokens_per_second:,.0f}" if rival.speed else "?"
            return tr("Fits too ({rate} tokens/s), but a 4-bit base is less exact and is not needed here.", rate=rate)
        return tr("Fits too, but only with weights that travel between the devices.")
    share = _seconds(rival) / _seconds(chosen)
    if share < 0.98:
        return tr("Fits too and may be faster, but only with what it keeps in the machine's RAM.")
    if share < 1.02:
        return tr("Fits too and is as fast, but is less simple.")
    return tr("Fits too, but takes about {share:.0%} of the chosen layout's time for a token.", share=share)


def _why_not_fit(problem: Problem, rival: Candidate) -> str:
    layout = rival.layout
    for rank, items in enumerate(rival.devices or (rival.memory,)):
        need, free = needed_bytes(layout, sum(items.values())), free_bytes(problem, layout, rank)
        if need > free:
            words = tr(
                "Does not fit: it needs {need:.1f} GB with its margin, and {free:.1f} GB are free.",
                need=need / GB,
                free=free / GB,
            )
            return " ".join([words, *_experts(problem, layout)])
    return tr(
        "Does not fit: it needs {need:.1f} GB of RAM, and {free:.1f} GB are free.",
        need=rival.host_bytes / GB,
        free=problem.hardware.host_free_bytes / GB,
    )


def _experts(problem: Problem, layout: Layout) -> list[str]:
    """What a quantised mixture keeps in 16 bits, in a sentence."""
    if layout.base == "none" or not problem.shape.experts or packs_experts(layout.base, problem.shape):
        return []
    size = compute_bytes(layout) * problem.shape.expert_parameters() / GB
    return [tr("Experts of this kind are not packed: {size:.1f} GB of them stay in 16 bits.", size=size)]


def _seconds(candidate: Candidate) -> float:
    return candidate.speed.step_seconds if candidate.speed else 1.0
