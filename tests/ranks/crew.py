"""Processes that train together on the CPU, forked from one that has imported everything already.

Imported by name in those processes, so what they run is a function of this module.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:
    sys.path[:0] = [str(TESTS), str(Path(__file__).parent)]


STEPS = 4
# Accumulation (a global batch is several micro-batches of uneven length), packing, clipping that bites, decay, dropout.
HARD = {
    "train__max_steps": STEPS,
    "train__learning_rate": 3e-3,
    "train__global_batch_tokens": 200,
    "train__max_grad_norm": 0.05,
    "train__weight_decay": 0.1,
    "train__warmup_steps": 1,
    "micro_batch_tokens": 64,
}
LORA = {"lora__dropout": 0.1, "lora__r": 4, "train__neftune_alpha": 5.0}
# A rate that does not depend on the run's length, so that a part of it can be run.
RUN = {
    "train__max_steps": 9,
    "train__learning_rate": 3e-3,
    "train__global_batch_tokens": 300,
    "train__schedule": "constant",
    "train__warmup_steps": 0,
    "train__save_every": 3,
    "train__keep_checkpoints": 9,
    "train__keep_best": False,
    "train__weight_decay": 0.1,
    "micro_batch_tokens": 64,
}


def options_of(name: str, method: str) -> dict[str, Any]:
    """`HARD`, with LoRA's own trials; PEFT has no dropout for the stacked experts of a mixture."""
    if method in ("full", "pretrain"):
        options: dict[str, Any] = dict(HARD)
    else:
        options = {**HARD, **LORA, **({"lora__dropout": 0.0} if "mixtral" in name else {})}
    if name == "neox":  # gradients of nearly nought, of which Adam makes steps as large as any, are rounding
        options["train__epsilon"] = 1e-5
    return options


def far(ours: Any, theirs: Any) -> float:
    """The largest relative difference, tensor by tensor."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-6)) for n in theirs)


def written(folder: str | Path) -> Any:
    """The weights in the only file of a result."""
    from safetensors.torch import load_file

    [file] = Path(folder).glob("*.safetensors")
    return load_file(file)


def moved(parts: Any, wanted: Any, place: Path, **options: Any) -> None:
    """Three steps under each of the strategies are the nine steps of `wanted`, and the result is the same files."""
    import pytest

    losses, steps = [], []
    for part, (strategy, ranks, how) in enumerate(parts):
        answers = run(
            place / str(part),
            ranks,
            train,
            folder=place / "run",
            strategy=strategy,
            resume=part > 0,
            write=part == len(parts) - 1,
            stop_at=3 * (part + 1),
            **options,
            **how,
            **RUN,
        )
        losses += answers[0]["losses"]
        steps += answers[0]["steps"]
    assert steps == list(range(1, 10))
    assert losses == pytest.approx(wanted["losses"], rel=1e-5)
    # What is put together on one rank only, is so on the first.
    weights = {name: weight for answer in reversed(answers) for name, weight in answer["weights"].items()}
    assert far(weights, wanted["weights"]) <= 1e-5
    assert far(written(answers[0]["result"]), written(wanted["result"])) <= 1e-5


def run(place: Path, ranks: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
    """`function(world, **arguments)` on each of `ranks` processes; what each gave. A failure on any is raised here."""
    place.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    os.environ["DS_ACCELERATOR"] = "cpu"
    context.set_forkserver_preload(["crew", "training", "kitaeru.engine.run", "torch.distributed.fsdp", "deepspeed"])
    jobs = [
        context.Process(target=_work, args=(place, rank, ranks, function, arguments), daemon=True)
        for rank in range(ranks)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    answers = []
    for rank, job in enumerate(jobs):
        if job.is_alive():
            job.kill()
        file = place / f"answer-{rank}"
        good, answer = pickle.loads(file.read_bytes()) if file.exists() else (False, f"exit code {job.exitcode}")
        answers.append(answer if good else Failure(f"rank {rank}: {answer}"))
    failures = [answer for answer in answers if isinstance(answer, Failure)]
    assert not failures, "\n".join(failures)
    return answers


class Failure(str):
    """What a process said when it failed."""


def _work(folder: Path, rank: int, ranks: int, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    from kitaeru.parallel.world import join, leave

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    try:
        world = join(store, rank=rank, size=ranks, local_rank=rank, device="cpu", local_size=ranks)
        answer = True, function(world, **arguments)
        world.wait()
        leave(world)
    except BaseException:
        answer = False, traceback.format_exc()
    (folder / f"answer-{rank}").write_bytes(pickle.dumps(answer))


def train(
    world: Any,
    *,
    folder: Path,
    model: Path,
    data: Path,
    resume: bool = False,
    write: bool = False,
    stop_at: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """A run of the real engine; what can be compared of it."""
    import training
    from kitaeru.engine import checkpoint
    from kitaeru.engine.result import write_result
    from kitaeru.events import Evaluated
    from kitaeru.parallel.start import hash_frozen

    run = training.Training(folder, model, data, world=world, **options)
    if stop_at:
        run.loop.total = stop_at
    if resume:
        found = checkpoint.available(folder / "checkpoints")
        run.loop.restore(found[-1])
    outcome = run.run()
    trainee = run.trainee
    return {
        "outcome": outcome,
        "steps": [step.step for step in run.steps],
        "losses": run.losses,
        "norms": [step.grad_norm for step in run.steps],
        "tokens": [step.tokens for step in run.steps],
        "valid": [event.loss for event in run.events if isinstance(event, Evaluated)],
        "weights": {n: trainee.strategy.gather(trainee.held, n, p).clone() for n, p in trainee.named},
        "numbers": sum(p.numel() for _, p in trainee.named),
        "frozen": hash_frozen(trainee.model) == trainee.frozen_hash,
        "fused": bool(trainee.fused),
        "notices": [notice.text for notice in run.notices],
        "result": str(write_result(trainee, folder)) if write else "",
    }


def settled(world: Any, *, folder: Path, model: Path, data: Path, **options: Any) -> dict[str, Any]:
    """What becomes of a model in INT8 that is right forward and wrong backward: in every layer a pair of a key's
    numbers is large, and of the queries' that meet it small.
    """
    from dataclasses import replace

    import torch

    import training
    from kitaeru.engine import eight_bits
    from kitaeru.plan.types import Decision

    eight_bits.TOKENS, eight_bits.GRADIENT_TOKENS = 512, 256
    run = training.Training(folder, model, data, world=world, arithmetic="int8", **options)
    trainee = run.trainee
    trainee.plan = replace(run.plan, decisions=(Decision("train.arithmetic", "int8", ""),))
    for fused in trainee.fused:
        q, k, _ = (member.stored.data for member in fused.qkv.members)
        with torch.no_grad():
            k.view(-1, 64, 256)[0, [5, 37]] *= 1e4
            q.view(-1, 64, 256)[:2, [5, 37]] /= 1e4
        fused.qkv = type(fused.qkv)(fused.qkv.members, "int8", fused.qkv.compute)
    eight_bits.settle_eight_bits(run.loop)
    return {
        "kinds": [
            {site: getattr(f, site).arithmetic for site in ("qkv", "out", "both", "down")} for f in trainee.fused
        ],
        "said": run.notices[-1].text,
        "left": [name for name, p in trainee.named if p.grad is not None],
    }


def answering(world: Any, *, folder: Path, model: Path, data: Path, stop_at: int, **options: Any) -> dict[str, Any]:
    """A run, and what its model says afterwards; `bytes` are those of the layers here."""
    import training
    from kitaeru.model.generate import Sampling, answer
    from kitaeru.parallel.start import hash_frozen

    run = training.Training(folder, model, data, world=world, **options)
    run.loop.total = stop_at
    run.run()
    trainee = run.trainee
    kept = {"frozen": hash_frozen(trainee.model) == trainee.frozen_hash, "losses": run.losses}
    here = [p.nbytes for n, p in trainee.model.named_parameters() if ".layers." in n and not p.is_meta]
    sampling = Sampling(max_new_tokens=12, repetition_penalty=1.3)
    texts = []
    for text in ("首都は", "1番目の質問。海の色は何色?"):
        ask = partial(answer, trainee.causal_lm, trainee.tokenizer, text=text, sampling=sampling)
        texts.append(trainee.inside(ask))
    return kept | {"texts": texts, "bytes": sum(here)}


def best(world: Any, *, folder: Path, model: Path, data: Path, step: int, **options: Any) -> dict[str, float]:
    """The validation loss of `step` when it was reached, and after the run with its weights put back."""
    import training
    from kitaeru.events import Evaluated

    run = training.Training(folder, model, data, world=world, **options)
    run.run()
    assert run.loop.valid is not None
    run.loop.progress.best_step = step
    assert run.loop.take_best() == step
    [then] = [event.loss for event in run.events if isinstance(event, Evaluated) and event.step == step]
    return {"then": then, "again": run.loop.evaluate(run.loop.valid)[0]}


def uneven(world: Any, *, bucket_bytes: int) -> dict[str, Any]:
    """Sums through a Reducer: parameter 0 has gradients everywhere, 1 on rank 1 only, 2 nowhere; rank 2 has none."""
    import torch
    from torch import nn

    from kitaeru.parallel.reducer import Reducer

    parameters = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    reducer = Reducer(parameters, bucket_bytes)
    answers = []
    for step in range(2):
        for parameter in parameters:
            parameter.grad = None
        if world.rank != 2:
            for last in (False, True):
                loss = parameters[0].sum() * (world.rank + 1 + step)
                if world.rank == 1:
                    loss = loss + 3 * parameters[1].sum()
                if last:
                    reducer.start()
                loss.backward()
        reducer.finish()
        answers.append([None if p.grad is None else p.grad.clone() for p in parameters])
    return {"grads": answers}


def runs_out(world: Any, *, rank: int, where: str, step: int, **options: Any) -> dict[str, Any]:
    """A run in which memory runs out on one rank after so many steps: in its `forward` or `backward` pass, or in its
    `validation`; what can be compared of it, and the sizes of micro-batches it came down to.
    """
    import torch

    import training
    from kitaeru.events import Evaluated, SteppedDown

    run = training.Training(world=world, **options)
    left = [1] if world.rank == rank else []

    def look(*_: Any) -> None:
        at_it = run.trainee.model.training == (where != "validation")
        if left and at_it and run.loop.progress.step == step:
            left.clear()
            raise torch.OutOfMemoryError("CUDA out of memory.")

    if where == "backward":
        run.trainee.named[len(run.trainee.named) // 2][1].register_hook(look)
    else:
        run.trainee.causal_lm.model.register_forward_pre_hook(look)
    outcome = run.run()
    return {
        "outcome": outcome,
        "left": left,
        "losses": run.losses,
        "valid": [event.loss for event in run.events if isinstance(event, Evaluated)],
        "sizes": [event.micro_batch_tokens for event in run.events if isinstance(event, SteppedDown)],
    }


def fails_once(folder: str, step: int, team: Any) -> str:
    """What a process started by `engine.launch` does: the run in `folder`, in which memory runs out on rank 1 in the
    middle of a forward pass after `step` steps, the first time that it gets there.
    """
    import torch

    from kitaeru.engine import rank, run
    from kitaeru.engine.place import meet

    place = team.place()
    ready = run._ready

    def watched(*arguments: Any) -> Any:
        trainee, loop = ready(*arguments)

        def look(*_: Any) -> None:
            if place.rank == 1 and loop.progress.step == step and trainee.plan.layout.micro_batch_tokens > 64:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        layers = trainee.causal_lm.model.layers
        layers[len(layers) // 2].mlp.register_forward_pre_hook(look)
        return trainee, loop

    run._ready = watched
    prepared = run.reopen(Path(folder), resume=team.resume, main=place.rank == 0)
    return rank.work(prepared, place, meet(place), []).outcome


def packed(world: Any, *, folder: Path, model: Path, data: Path, **options: Any) -> dict[str, Any]:
    """A run on a base in 4 bits: digests of each packed weight, of its constants, and of what it expands to, put
    together, before and after; the packed bytes that lie here; and which layers this process has read.
    """
    import hashlib

    import bitsandbytes as bnb
    import torch
    from torch.distributed.tensor import DTensor

    import training
    from kitaeru.engine import build
    from kitaeru.events import Evaluated
    from kitaeru.model import parts
    from kitaeru.model.experts import STACKS, PackedExperts
    from kitaeru.parallel.start import hash_frozen

    kinds = (bnb.nn.Linear4bit, PackedExperts)
    layers: list[int] = []
    read = parts.Parts.read

    def watched(self: Any, number: int) -> Any:
        layers.append(number)
        return read(self, number)

    parts.Parts.read = watched  # type: ignore[method-assign]
    run = training.Training(folder, model, data, world=world, **options)
    trainee = run.trainee

    def digest(tensor: Any) -> str:
        return hashlib.sha256(tensor.detach().cpu().clone().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()

    def digests() -> dict[str, str]:
        found = {}
        for name, module in trainee.causal_lm.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight, state = module.weight, module.quant_state
                whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.data
                found[name] = digest(whole)
                for key, value in state.as_dict(packed=True).items():
                    found[f"{name}/{key}"] = digest(value)
                found[f"{name}/values"] = digest(bnb.functional.dequantize_4bit(whole.cpu(), state))
            if isinstance(module, PackedExperts):
                found |= {f"{name}/{own}": digest(buffer) for own, buffer in module.named_buffers(recurse=False)}
                for own, stack in module.named_parameters(recurse=False):
                    found[f"{name}/{own}"] = digest(stack.full_tensor() if isinstance(stack, DTensor) else stack.data)
        return found

    def gathered() -> dict[str, str]:
        """What a forward pass of the modules themselves expands their weights to."""
        seen: dict[str, str] = {}

        def look(name: str, module: Any) -> Any:
            def hook(*_: Any) -> None:
                if isinstance(module, PackedExperts):
                    seen[f"{name}/used"] = digest(torch.cat([module.whole(own).flatten() for own in STACKS]))
                else:
                    whole = bnb.functional.dequantize_4bit(module.weight.data, module.quant_state)
                    seen[f"{name}/used"] = digest(whole)

            return module.register_forward_pre_hook(hook)

        modules = trainee.causal_lm.named_modules()
        hooks = [look(name, module) for name, module in modules if isinstance(module, kinds)]
        build._probe_logits(trainee, build._probe(trainee, (9, 6)))
        for hook in hooks:
            hook.remove()
        return seen

    before = digests() | gathered()
    run.run()
    frozen = hash_frozen(trainee.model) == trainee.frozen_hash
    modules = [m for m in trainee.causal_lm.modules() if isinstance(m, kinds)]
    here = [p for m in modules for p in m.parameters(recurse=False) if p.dtype == torch.uint8]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in here]
    return {
        "before": before,
        "after": digests() | gathered(),
        "bytes": sum(tensor.numel() for tensor in local),
        "read": layers,
        "losses": run.losses,
        "valid": [event.loss for event in run.events if isinstance(event, Evaluated)],
        "weights": {n: trainee.strategy.gather(trainee.held, n, p).clone() for n, p in trainee.named},
        "frozen": frozen,
    }


def skips(world: Any, *, step: int, **options: Any) -> dict[str, Any]:
    """A run in which step number `step` is left out, as one whose loss jumps is; what can be compared of it."""
    import training

    run = training.Training(world=world, **options)
    verdict = run.loop.watch.verdict

    def jumps(loss: float) -> str:
        return "spike" if run.loop.progress.step + 1 == step else verdict(loss)

    run.loop.watch.verdict = jumps  # type: ignore[method-assign]
    run.run()
    return {"losses": run.losses, "skipped": [event.step for event in run.steps if event.skipped]}


def writes_behind(world: Any, *, then: str, **options: Any) -> dict[str, Any]:
    """A run whose checkpoints are written in the background, that of step 6 only once step 8 is done. As `then` says,
    rank 0 is killed at that moment, or rank 1 finds the disk full. Nothing may be put together for a checkpoint.
    """
    import errno
    import os
    import signal
    import threading

    import training
    from kitaeru.engine import checkpoint, keep
    from kitaeru.events import Saved

    keep.BACKGROUND_BYTES = 0
    run = training.Training(world=world, **options)
    loop, folder = run.loop, run.loop.folder
    gate, seen = threading.Event(), []
    write, step, strategy = checkpoint.write_part, loop._step, run.trainee.strategy

    def write_later(temporary: Path, number: int, tensors: Any) -> None:
        if "step-00000006" in temporary.name:
            gate.wait(60)
            if then == "full" and world.rank == 1:
                checkpoint.save_file = full  # type: ignore[attr-defined]
        write(temporary, number, tensors)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def watched() -> None:
        step()
        if loop.progress.step == 8:
            seen.append([path.name for path in checkpoint.available(folder)])
            if then == "killed" and world.rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            gate.set()

    def gathers(*_: Any) -> None:
        raise AssertionError("put together")

    checkpoint.write_part, loop._step = write_later, watched  # type: ignore[method-assign]
    gather, strategy.gather = strategy.gather, gathers  # type: ignore[method-assign]
    outcome = run.run()
    strategy.gather = gather  # type: ignore[method-assign]
    files = {path.name: sorted((f.name, f.stat().st_size) for f in path.iterdir()) for path in folder.glob("step-*")}
    saved = [event.step for event in run.events if isinstance(event, Saved)]
    return {"outcome": outcome, "losses": run.losses, "seen": seen, "files": files, "saved": saved}


def loads(world: Any, *, model: Path, strategy: str) -> tuple[int, list[int]]:
    """Bytes of one layer, and what the layers hold here each time that another one has come, in full training."""
    import torch

    from kitaeru.model.parts import Parts, outline
    from kitaeru.parallel import strategy_of
    from kitaeru.parallel.types import Engine, Unit
    from kitaeru.plan.deepspeed import deepspeed_config
    from kitaeru.plan.types import Layout
    from kitaeru.recipe.types import LoraSection, ModelSection
    from training import make_recipe

    layout = Layout(strategy, "full", "none", "fp32", "keep", 64, "cpu", world.size, "", world.size)
    loaded, source = outline(ModelSection(name=str(model)), layout, LoraSection(), 0)
    assert source is not None
    named = list(loaded.requires_grad_(True).named_parameters())
    layers = [parameter for name, parameter in named if ".layers." in name]
    one, seen, put = sum(p.nbytes for p in layers) // len(source.layers), [], Parts.put

    def watched(self: Any, tensors: Any) -> None:
        put(self, tensors)
        seen.append(sum(p.untyped_storage().nbytes() for p in layers))

    Parts.put = watched  # type: ignore[method-assign]
    engine = Engine(
        deepspeed_config(layout, make_recipe(model, model, "full")) if strategy == "zero3" else {},
        lambda trained: torch.optim.AdamW([parameter for _, parameter in trained], fused=True),
    )
    strategy_of(layout).hold(Unit(loaded, source, engine), named, world, layout)
    return one, seen
