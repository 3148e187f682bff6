"""What is wrong with how training goes today: one table of rules, each a pure function from facts to a finding.

A rule that can be mended by the recipe names the change; what it gains is priced afterwards (`advise`). A new rule is a
function and a row in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from kitaeru.events import SteppedDown
from kitaeru.i18n import N_, in_every_language, tr
from kitaeru.plan.decide import GLOBAL_BATCH_TOKENS
from kitaeru.plan.types import Candidate
from kitaeru.report.advice.facts import Change, Facts
from kitaeru.report.usage import device_text, devices_used, time_shares
from kitaeru.report.wording import bytes_text, count_text, loss_text, percent_text, round_two

# Shares above which something is worth a sentence.
UNUSED_MEMORY, WAITING, LAUNCHING, LOOKING, SAVING, CUT, FULL, TAKEN = 0.45, 0.10, 0.25, 0.15, 0.10, 0.02, 0.97, 0.10
# Strategies that give each device some of the layers.
STAGED = ("pipeline", "model_parallel")
# A device that takes so many times as long as the mean holds the others up.
UNEVEN = 1.1


@dataclass(frozen=True)
class Finding:
    """Something to mend. `what` is the problem with its numbers, `why` what it costs; `change` are the recipe's values
    that mend it, `command` what to type where it is no matter of a recipe. A `trade` changes what is learnt, or pins
    something, so it is never mixed into the changes that are free.
    """

    name: str
    what: str
    why: str
    change: Change = field(default_factory=dict)
    command: str = ""
    trade: bool = False


Rule = Callable[[Facts], Finding | None]


def _does_not_fit(f: Facts) -> Finding | None:
    if f.today.now is not None:
        return None
    return Finding(
        "does-not-fit",
        tr("{model} does not train this way on one device at all.", model=f.today.recipe.model.name),
        tr("The smallest layout of today's choices needs more memory than the device has."),
        {"strategy": "auto", "limits.devices": None, "limits.checkpointing": None, "method": "auto"},
    )


def _idle_gpus(f: Facts) -> Finding | None:
    count = len(f.hardware.devices)
    if not f.today.on_gpus or f.today.devices >= count:
        return None
    return Finding(
        "idle-gpus",
        tr("GPUs at work: {used} of {count}.", used=f.today.devices, count=count),
        tr("With a copy of the model (or a piece of it) on each card, all of them compute at once."),
        {"strategy": "auto", "limits.devices": None},
    )


def _unused_memory(f: Facts) -> Finding | None:
    if not f.hardware.devices or f.today.peak is None:
        return None
    total = sum(device.memory_bytes for device in f.hardware.devices)
    used = f.today.peak.value * f.today.devices
    if used / total > 1 - UNUSED_MEMORY:
        return None
    return Finding(
        "unused-memory",
        tr("{unused} of {total} GPU memory is never used.", unused=bytes_text(total - used), total=bytes_text(total)),
        tr("It would hold a larger model, longer examples, or activations that are now computed twice."),
    )


def _no_packing(f: Facts) -> Finding | None:
    if f.today.recipe.data.packing:
        return None
    data = f.today.data
    what = tr("Examples are not packed: each goes through the model alone or padded to its longest neighbour.")
    if data is not None and data.examples:
        what += " " + tr(
            "They have {mean} tokens on average and up to {longest}.",
            mean=count_text(data.tokens / data.examples),
            longest=count_text(data.longest),
        )
    why = tr("Packed rows hold no padding, and examples still never see one another.")
    return Finding("no-packing", what, why, {"data.packing": True})


def _small_micro_batch(f: Facts) -> Finding | None:
    now, pinned = f.today.now, f.today.recipe.limits.micro_batch_tokens
    if now is None or pinned is None:
        return None
    larger = [
        c for c in f.priced if c.layout.method == now.layout.method and c.layout.micro_batch_tokens >= 1.5 * pinned
    ]
    if not larger:
        return None
    most = max(c.layout.micro_batch_tokens for c in larger)
    return Finding(
        "small-micro-batch",
        tr("A micro-batch has {now} tokens; {most} fit.", now=count_text(pinned), most=count_text(most)),
        tr("Small micro-batches launch more kernels, and unpack 4-bit weights more often, for the same tokens."),
        {"limits.micro_batch_tokens": None},
    )


def _recomputes_without_need(f: Facts) -> Finding | None:
    now = f.today.now
    if now is None or now.layout.activations != "recompute" or f.today.recipe.limits.checkpointing is not True:
        return None
    kept = [c for c in f.priced if c.layout.activations == "keep" and c.layout.method == now.layout.method]
    if not kept:
        return None
    return Finding(
        "recompute",
        tr("Activations are computed twice (gradient checkpointing), although they fit in memory."),
        tr("That is about a third more arithmetic in every step."),
        {"limits.checkpointing": None, "limits.micro_batch_tokens": None},
    )


def _no_accumulation(f: Facts) -> Finding | None:
    now, train = f.today.now, f.today.recipe.train
    # A small data set has a small batch on purpose, and a CPU too.
    if now is None or not f.today.on_gpus or (f.today.data is not None and f.today.kind != "baseline"):
        return None
    wanted = train.global_batch_tokens is not None or train.global_batch_examples is not None
    if not wanted or now.global_batch_tokens >= GLOBAL_BATCH_TOKENS:
        return None
    return Finding(
        "no-accumulation",
        tr("A step learns from {count} tokens at most.", count=count_text(now.global_batch_tokens)),
        tr(
            "So small a batch has a noisy gradient and pays for an optimizer step, and an exchange between the cards, "
            "more often. An effective batch of 64 examples is one line: train.global_batch_examples=64."
        ),
        {"train.global_batch_tokens": None, "train.global_batch_examples": None},
    )


def _full_precision(f: Facts) -> Finding | None:
    now = f.today.now
    if now is None or now.layout.precision != "fp32" or not f.today.on_gpus:
        return None
    return Finding(
        "fp32",
        tr("Arithmetic is in 32 bits."),
        tr("The matrix units are many times as fast in 16 bits; the trained weights stay in 32."),
        {"train.precision": "auto"},
    )


def _plain_arithmetic(f: Facts) -> Finding | None:
    now, wish = f.today.now, f.today.recipe.train.arithmetic
    if now is None or wish not in ("plain", "16") or not f.today.on_gpus or now.layout.method not in ("lora", "qlora"):
        return None
    return Finding(
        "arithmetic",
        tr("Products with the frozen weights are computed in 16 bits, layer by layer as the model's code has it."),
        tr("Where it is faster, kitaeru fuses each layer into one operation and multiplies in 8 bits."),
        {"train.arithmetic": "auto"},
        trade=f.today.kind != "baseline",
    )


def _slow_attention(f: Facts) -> Finding | None:
    kernel = f.today.recipe.model.attention
    if kernel not in ("eager", "sdpa") or not f.today.shape.packed_causal:
        return None
    return Finding(
        "attention",
        tr("Attention is pinned to {kernel}.", kernel=kernel),
        tr("The packed kernel keeps no mask and no square of the length in memory."),
        {"model.attention": "auto"},
    )


def _layers_in_turn(f: Facts) -> Finding | None:
    now = f.today.now
    if now is None or now.layout.strategy not in STAGED or now.speed is None or now.speed.micro_batches > 1:
        return None
    return Finding(
        "layers-in-turn",
        tr("The cards take turns: each waits {share} of the time for the other.", share=percent_text(_idle(now))),
        tr("The same cut with several micro-batches under way, or a copy on each card, keeps all of them busy."),
        {"strategy": "auto", "limits.micro_batch_tokens": None},
    )


def _bubble(f: Facts) -> Finding | None:
    now = f.today.now
    if now is None or now.layout.strategy not in STAGED or now.speed is None or _idle(now) < WAITING:
        return None
    if now.speed.micro_batches == 1:
        return None
    return Finding(
        "bubble",
        tr(
            "Stages wait {share} of the time: a step has {count} micro-batches.",
            share=percent_text(_idle(now)),
            count=now.speed.micro_batches,
        ),
        tr("More micro-batches in a step fill the pipeline: a larger global batch."),
        {"train.global_batch_tokens": 2 * now.global_batch_tokens, "train.global_batch_examples": None},
        trade=True,
    )


def _waits_for_the_link(f: Facts) -> Finding | None:
    now = f.today.now
    if now is None or now.speed is None or now.layout.devices < 2 or now.layout.cuts:
        return None
    share = now.speed.parts.get("communication", 0.0) / now.speed.step_seconds
    if share < WAITING or f.best is None or f.best.layout.way == now.layout.way:
        return None
    return Finding(
        "link",
        tr("{way} waits {share} of the time for other cards.", way=now.layout.way, share=percent_text(share)),
        tr("{way} moves less between them and fits too.", way=f.best.layout.way),
        {"strategy": "auto"},
    )


def _waits_for_the_host(f: Facts) -> Finding | None:
    now = f.today.now
    if now is None or now.speed is None or not f.today.on_gpus:
        return None
    share = now.speed.parts.get("host", 0.0) / now.speed.step_seconds
    if share < LAUNCHING:
        return None
    graphs = {} if f.today.recipe.train.cuda_graphs is None else {"train.cuda_graphs": None}
    return Finding(
        "host",
        tr("The GPU waits {share} of the time for the CPU to launch work.", share=percent_text(share)),
        tr("The model or the micro-batch is small for this card: more tokens at a time cost nothing here."),
        {"limits.micro_batch_tokens": None, "train.global_batch_tokens": 2 * now.global_batch_tokens,
         "train.global_batch_examples": None, **graphs},
        trade=True,
    )  # fmt: skip


def _four_bits(f: Facts) -> Finding | None:
    now, recipe = f.today.now, f.today.recipe
    if now is None or now.layout.method != "lora" or now.layout.base != "none" or not f.today.on_gpus:
        return None
    if recipe.model.quantize not in ("auto", "none"):
        return None
    return Finding(
        "four-bits",
        tr("The frozen base lies in 16 bits: {size} of weights.", size=bytes_text(now.memory.get("weights", 0))),
        tr(
            "In 4 bits (QLoRA) it takes about a third, and the room saved keeps activations or holds a larger model. "
            "It is a little less exact: compare the validation losses."
        ),
        {"method": "qlora", "model.quantize": "auto"},
        trade=True,
    )


def _sixteen_bits(f: Facts) -> Finding | None:
    now = f.today.now
    if now is None or now.layout.method != "qlora":
        return None
    return Finding(
        "sixteen-bits",
        tr("The base is held in 4 bits."),
        tr("Where 16 bits fit on every card, LoRA is more exact."),
        {"method": "lora", "model.quantize": "auto"},
        trade=True,
    )


def _slower_than_planned(f: Facts) -> Finding | None:
    now, rate = f.today.now, f.today.rate
    if now is None or now.speed is None or rate is None or rate.value >= now.speed.low or not f.today.on_gpus:
        return None
    numbers = {"rate": count_text(rate.value), "low": count_text(round_two(now.speed.low)),
               "high": count_text(round_two(now.speed.high))}  # fmt: skip
    if rate.basis.kind == "stated":
        what = tr("You have {rate} tokens/s where the planner expects {low} to {high} of this very way.", **numbers)
    else:
        what = tr("{rate} tokens/s were measured where the plan expected {low} to {high}.", **numbers)
    return Finding(
        "slower-than-planned",
        what,
        tr("A card that is hot, throttled, shared or in a narrow slot looks like this, and so does slow data."),
        command="kitaeru doctor",
    )


def _throttled(f: Facts) -> Finding | None:
    seen = [used for used in devices_used(f.today.past) if used.used] if f.today.past else []
    held = [(share, reason, used) for used in seen for reason, share in used.throttled.items()]
    share, reason, used = max(held, key=lambda item: item[0], default=(0.0, "", None))
    if used is None or share < WAITING:
        return None
    return Finding(
        "throttled",
        tr("{device} was held back {share} of the time: {reason}.", device=f"{device_text(used.device)} {used.name}",
           share=percent_text(share), reason=reason),
        tr("More air, a clean filter or another slot for heat; a higher limit (nvidia-smi -pl) for power."),
        command="nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER",
    )  # fmt: skip


def _waits_for_data(f: Facts) -> Finding | None:
    share = time_shares(f.today.past.steps).get("data", 0.0) if f.today.past else 0.0
    if share < WAITING:
        return None
    return Finding(
        "data",
        tr("{share} of the time goes into putting the data together.", share=percent_text(share)),
        tr("The devices wait meanwhile. A slow or distant disk looks like this: copy the data to a local one."),
    )


def _slow_rank(f: Facts) -> Finding | None:
    told = [step.rank_seconds for step in (f.today.past.steps if f.today.past else ()) if len(step.rank_seconds) > 1]
    if not told:
        return None
    means = [fmean(seconds) for seconds in zip(*told, strict=True)] if len({len(t) for t in told}) == 1 else []
    if not means or max(means) < UNEVEN * fmean(means):
        return None
    slowest = means.index(max(means))
    return Finding(
        "slow-rank",
        tr("Device {rank} takes {times:.2f} times as long as the mean for the same work.", rank=slowest,
           times=max(means) / fmean(means)),
        tr("All others wait for it: a hotter card, a narrower slot, or another program on it."),
        command="kitaeru doctor",
    )  # fmt: skip


def _stepped_down(f: Facts) -> Finding | None:
    steps = f.today.past.of(SteppedDown) if f.today.past else []
    if not steps:
        return None
    last = steps[-1]
    return Finding(
        "stepped-down",
        tr(
            "Memory ran out at step {step}; the run went on with {tokens} tokens at a time.",
            step=count_text(last.step),
            tokens=count_text(last.micro_batch_tokens),
        ),
        tr("The result is the same, but time was lost. Beginning with less at a time loses none."),
        {"limits.micro_batch_tokens": last.micro_batch_tokens},
        trade=True,
    )


def _validates_too_often(f: Facts) -> Finding | None:
    past = f.today.past
    if past is None or not past.seconds:
        return None
    trained = [event for event in past.evaluations if event.step > 0]
    share = sum(event.seconds for event in trained) / past.seconds
    if share < LOOKING or len(trained) < 2:
        return None
    every = (past.steps[-1].step // len(trained)) or 1
    return Finding(
        "validation",
        tr("Validation takes {share} of the time.", share=percent_text(share)),
        tr("Half as many looks, or fewer validation examples, tell the same story."),
        {"train.eval_every": 2 * every},
        trade=True,
    )


def _saves_too_often(f: Facts) -> Finding | None:
    past = f.today.past
    if past is None or not past.seconds or len(past.checkpoints) < 2:
        return None
    share = sum(event.seconds for event in past.checkpoints) / past.seconds
    if share < SAVING:
        return None
    every = (past.steps[-1].step // len(past.checkpoints)) or 1
    return Finding(
        "saving",
        tr("Writing checkpoints takes {share} of the time.", share=percent_text(share)),
        tr("Half as many lose at most twice as many steps when the power goes."),
        {"train.save_every": 2 * every},
        trade=True,
    )


def _cuts_examples(f: Facts) -> Finding | None:
    past, now = f.today.past, f.today.now
    train = past.data.get("train") if past else None
    if train is None or now is None or not train.examples:
        return None
    shortened = in_every_language(N_("too long, the end cut off")) | in_every_language(N_("too long, left out"))
    cut = sum(count for why, count in train.left_out.items() if why in shortened)
    if cut / train.examples < CUT:
        return None
    longer = 2 * (f.today.recipe.data.seq_len or train.longest)
    return Finding(
        "cut-examples",
        tr("{count} examples ({share}) are longer than data.seq_len and were cut or left out.", count=count_text(cut),
           share=percent_text(cut / train.examples)),
        tr("What is cut off is not learnt, and most often it is the end of the answer."),
        {"data.seq_len": longer, "limits.micro_batch_tokens": None},
        trade=True,
    )  # fmt: skip


def _learns_by_heart(f: Facts) -> Finding | None:
    past = f.today.past
    best, last = (past.best, past.evaluations[-1] if past.evaluations else None) if past else (None, None)
    if best is None or last is None or last.step == 0 or best.step > 0.7 * last.step or last.loss < 1.01 * best.loss:
        return None
    return Finding(
        "by-heart",
        tr(
            "The validation loss was lowest at step {best} ({low}) and is {high} at step {last}.",
            best=count_text(best.step),
            low=loss_text(best.loss),
            high=loss_text(last.loss),
            last=count_text(last.step),
        ),
        tr("The steps after that taught the examples by heart. The result is the best checkpoint; the time was lost."),
        {"train.early_stop": 3},
        trade=True,
    )


def _still_learning(f: Facts) -> Finding | None:
    past = f.today.past
    looks = [event for event in past.evaluations if event.step > 0] if past else []
    if past is None or len(looks) < 4 or past.finished is None or past.finished.outcome != "finished":
        return None
    third = looks[len(looks) * 2 // 3 - 1]
    fall = (third.loss - looks[-1].loss) / third.loss if third.loss else 0.0
    if past.best is not looks[-1] or fall < 0.01:
        return None
    steps = past.steps[-1].step
    more = {"train.max_steps": 2 * steps} if f.today.recipe.train.max_steps else {"train.epochs": _more_epochs(f)}
    return Finding(
        "still-learning",
        tr("The validation loss still fell by {share} in the last third of the run.", share=percent_text(fall)),
        tr("A longer run would reach lower; the learning rate's fall is stretched with it."),
        more,
        trade=True,
    )


def _more_epochs(f: Facts) -> float:
    past = f.today.past
    return float(max(1, round(2 * past.steps[-1].epoch))) if past and past.steps else 2.0


def _nearly_full(f: Facts) -> Finding | None:
    peak = f.today.peak
    if peak is None or peak.basis.kind != "measured" or not f.today.on_gpus or not f.today.hardware.devices:
        return None
    size = min(device.memory_bytes for device in f.today.hardware.devices)
    if peak.value / size < FULL:
        return None
    return Finding(
        "nearly-full",
        tr("The peak was {peak} of {size}.", peak=bytes_text(peak.value), size=bytes_text(size)),
        tr("One longer example, or a desktop that opens a window, ends the run."),
        {"limits.memory_gb": round(0.92 * size / 1e9, 1)},
        trade=True,
    )


def _shared_gpu(f: Facts) -> Finding | None:
    taken = [d for d in f.hardware.devices if d.memory_bytes and 1 - d.free_bytes / d.memory_bytes > TAKEN]
    if f.hardware.described or not taken:
        return None
    return Finding(
        "shared-gpu",
        tr(
            "Other programs hold {size} of {device}.",
            size=bytes_text(taken[0].memory_bytes - taken[0].free_bytes),
            device=taken[0].name,
        ),
        tr("The planner leaves that room to them. Close them, or move the desktop to another card."),
        command="nvidia-smi",
    )


def _container(f: Facts) -> Finding | None:
    if not f.hardware.container or len(f.hardware.devices) < 2:
        return None
    return Finding(
        "container",
        tr("This runs in a container ({name}) with several GPUs.", name=f.hardware.container),
        tr(
            "NCCL exchanges data through shared memory, of which a container has 64 MB unless told otherwise; too "
            "little looks like a bus error or a hang."
        ),
        command="docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 …",
    )


def _no_peer_access(f: Facts) -> Finding | None:
    pair = f.hardware.devices
    if len(pair) < 2 or all(device.p2p for device in pair) or any(link.kind == "nvlink" for link in f.hardware.links):
        return None
    return Finding(
        "no-peer-access",
        tr("These cards cannot read each other's memory directly."),
        tr("Data between them goes through RAM, at about a third of the speed: copies (ddp) suffer least from it."),
        command="kitaeru doctor",
    )


def _idle(candidate: Candidate) -> float:
    idle = candidate.speed.idle if candidate.speed else ()
    return sum(idle) / len(idle) if idle else 0.0


RULES: tuple[Rule, ...] = (
    _does_not_fit,
    _idle_gpus,
    _layers_in_turn,
    _bubble,
    _waits_for_the_link,
    _waits_for_the_host,
    _unused_memory,
    _no_packing,
    _small_micro_batch,
    _recomputes_without_need,
    _no_accumulation,
    _full_precision,
    _plain_arithmetic,
    _slow_attention,
    _four_bits,
    _sixteen_bits,
    _slower_than_planned,
    _nearly_full,
    _throttled,
    _waits_for_data,
    _slow_rank,
    _stepped_down,
    _shared_gpu,
    _container,
    _no_peer_access,
    _validates_too_often,
    _saves_too_often,
    _cuts_examples,
    _learns_by_heart,
    _still_learning,
)


def findings(facts: Facts) -> list[Finding]:
    """All that is wrong, in the order of `RULES`."""
    return [finding for rule in RULES if (finding := rule(facts)) is not None]
