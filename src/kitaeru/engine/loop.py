"""The training loop: one optimizer step after another, validation and checkpoints when due. It knows no strategy."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kitaeru.data.batches import MicroBatches, eval_batches, micro_batches
from kitaeru.data.corpus import Corpus
from kitaeru.data.types import MicroBatch
from kitaeru.engine import checkpoint
from kitaeru.engine.adamw16 import AdamW16
from kitaeru.engine.build import Trainee
from kitaeru.engine.gates import gradient_gate, waiting
from kitaeru.engine.in_backward import Doing
from kitaeru.engine.keep import Kept
from kitaeru.engine.ladder import Ladder
from kitaeru.engine.memory import peak_bytes, trim
from kitaeru.engine.optim import set_rate
from kitaeru.engine.schedule import rate
from kitaeru.engine.watch import Stopwatch
from kitaeru.errors import TrainingError
from kitaeru.events import Evaluated, Notice, Step
from kitaeru.i18n import tr
from kitaeru.parallel.types import Work

# A terminal's Ctrl-C reaches every process of a run, and whoever started them passes it on: one wish, heard twice.
SAME_SIGNAL_SECONDS = 0.5
TRIM_EVERY = 16
# Steps of a start or a resumption whose gradients are looked at one by one.
GATED = 2


class Loop(Kept):
    """Trains a `Trainee` on a corpus."""

    def __init__(
        self, trainee: Trainee, train: Corpus, valid: Corpus | None, run: Path, fingerprints: dict[str, Any]
    ) -> None:
        super().__init__(trainee, train, valid, run, fingerprints)
        self.total = self.section.max_steps or self.sampler.steps_in(self.section.epochs or 1.0)
        self.gated = 0
        self.waiting: set[str] = set()  # what need not have a gradient yet
        longest = max(corpus.facts.longest for corpus in (train, valid) if corpus is not None)
        self.ladder = Ladder(trainee, run, longest, self._save_now)
        self.clock = Stopwatch(trainee.device)
        self.stop_signal: int | None = None
        self.signalled = 0.0

    # ---- the page: what happens, in order -------------------------------------------------------------------------

    def __call__(self) -> str:
        """Train to the end. Returns the outcome: "finished", "stopped_early" or "interrupted".

        Raises:
            TrainingError: the loss is not finite, a gradient never arrives (nothing is saved then).
            CheckpointError: a checkpoint cannot be written; the earlier ones are untouched.
            SteppedDownError: memory ran out; the run must be started again, on the rung that it has written down.
        """
        with self._signals():
            if self.progress.step == 0 and self.valid is not None:
                self._validate()
            while self.progress.step < self.total and not self._given_up():
                self._step()
                self.settle(wait=False)
                done = self.progress.step
                if done % TRIM_EVERY == 0:
                    trim(self.trainee.device)
                improved = False
                if self.valid is not None and self._due(done, self.section.eval_every):
                    improved = self._validate()
                stop = self.world.any(self.stop_signal is not None)
                if (
                    self._due(done, self.section.save_every)
                    or (improved and self.section.keep_best)
                    or stop
                    or self._given_up()
                ):
                    self.save()
                if stop and done < self.total:
                    self.settle(wait=True)
                    return "interrupted"
            self.world.pulse.free()
            self.settle(wait=True)
        return "stopped_early" if self.progress.step < self.total else "finished"

    def _step(self) -> None:
        started, index = time.perf_counter(), self.progress.step
        trainee = self.trainee
        self.clock.begin()
        with self.clock.data():
            before = self.sampler.state_dict()
            batches = self._split(self.sampler.next())
        trained = batches.trained_tokens
        multiplier = rate(index, self.total, self.section)
        set_rate(trainee.optimizer, multiplier)
        while True:
            with self._changing("step", batches):
                shares = self._gradients(batches, trained, index)
            # Alone, all of it is launched before anything is waited for.
            early = self._clipped() if shares is not None and self.world.size == 1 else None
            losses = self._together(shares, len(batches))
            if losses is not None:
                break
            self.sampler.load_state_dict(before)
            self.ladder.down(index)
            batches = self._split(self.sampler.next())
        loss = float(losses.sum())
        norm = float(self._clipped() if early is None else early)
        skipped = self._update(loss, norm, losses, batches, index)
        self.progress.step += 1
        if trainee.held.replays is not None and (why := trainee.held.replays.excuse()) is not None:
            text = tr("Micro-batches are launched kernel by kernel: they cannot be CUDA graphs ({why}).", why=why)
            trainee.say(text, "warning", self.progress.step)
        seconds = time.perf_counter() - started
        tokens = sum(batches.tokens)
        peaks = self.world.numbers([peak_bytes(device) for device in trainee.held.devices or (trainee.device,)])
        trainee.emit(
            Step(
                step=self.progress.step,
                loss=loss,
                tokens=tokens,
                trained_tokens=trained,
                tokens_per_second=tokens / seconds,
                learning_rate=trainee.plan.recipe.train.learning_rate * multiplier,  # type: ignore[operator]
                grad_norm=norm,
                peak_bytes=max(peaks),
                device_peaks=tuple(peaks) if len(peaks) > 1 else (),
                data_seconds=self.clock.data_seconds,
                wait_seconds=self.clock.between("own", "whole"),
                rank_seconds=self._rank_seconds(),
                epoch=self.sampler.epoch,
                seconds=seconds,
                skipped=skipped,
            )
        )

    def _save_now(self) -> None:
        self.save()
        self.settle(wait=True)

    # ---- the parts ------------------------------------------------------------------------------------------------

    def _split(self, chosen: list[int]) -> MicroBatches:
        # Cut and numbered before it is dealt out: the same micro-batches on any number of ranks.
        recipe = self.trainee.plan.recipe
        return micro_batches(
            self.train,
            chosen,
            micro_batch_tokens=self.trainee.plan.layout.micro_batch_tokens,
            packing=recipe.data.packing,
            filled=self.trainee.plan.layout.graphs,
        )

    def _gradients(self, batches: MicroBatches, trained: int, index: int) -> dict[int, torch.Tensor] | None:
        """Accumulate the gradients of the global batch; the share of the mean loss of each micro-batch that this rank
        has computed. None when memory ran out on it: then the gradients are nobody's.
        """
        trainee = self.trainee
        if not (trainee.model.training and trainee.causal_lm.training):  # asking thousands of modules takes 10 ms
            trainee.model.train()

        def begin(number: int | None) -> None:
            # Dropout and noise depend on the seed, the step, the place in it and the layer alone: a resumed run draws
            # the same, and so does another number of ranks.
            self.world.pulse.working(index)
            trainee.draws.begin((self.section.seed * 1_000_003 + index) * 65_537 + (number or 0))

        work = self._work(batches, begin, lambda loss: loss / trained, self._to_go_back)
        self.clock.mark("begin")
        shares = self._passes(lambda: trainee.strategy.gradients(trainee.held, work))
        self.clock.mark("own")
        self.world.pulse.waiting()
        trainee.strategy.reduce(trainee.held)
        self.clock.mark("whole")
        return shares

    def _changing(self, what: Doing, batches: MicroBatches) -> AbstractContextManager[None]:
        """Where weights change in the backward pass, what that does to them."""
        in_backward = self.trainee.in_backward
        if in_backward is None:
            return nullcontext()
        assert len(batches) == 1, "a gradient is not whole before its last micro-batch"
        if self.gated < GATED:
            self.waiting = waiting(self.trainee.named)
        return in_backward.doing(what)

    def _to_go_back(self, share: torch.Tensor) -> torch.Tensor:
        """What a backward pass begins with. Where that changes weights, the loss is looked at before."""
        in_backward = self.trainee.in_backward
        if in_backward is not None and not self.watch.allows(float(share.detach())):
            in_backward.drop()
        return self.trainee.scaler.scale(share)

    def _passes(self, passes: Callable[[], dict[int, torch.Tensor]]) -> dict[int, torch.Tensor] | None:
        """What they give; None when memory ran out on this rank, and nothing of them is left. Alone, a rank gives its
        graphs' memory up first, and tries once more.
        """
        replays = self.trainee.held.replays if self.world.size == 1 else None
        for _ in range(2):
            try:
                return passes()
            except (RuntimeError, MemoryError) as error:
                in_backward = self.trainee.in_backward
                again = in_backward is None or not in_backward.half_done
                self.ladder.caught(error, self.progress.step, again=again)
            if replays is None or not replays.drop():
                break
        return None

    def _work(
        self,
        batches: MicroBatches,
        begin: Callable[[int | None], None],
        share: Callable[[torch.Tensor], torch.Tensor],
        scale: Callable[[torch.Tensor], torch.Tensor] = lambda share: share,
    ) -> Work:
        """The micro-batches this rank has a part in."""
        trainee, layout = self.trainee, self.trainee.plan.layout

        def batch(number: int | None, device: torch.device) -> MicroBatch:
            with self.clock.data():
                return batches[_shortest(batches) if number is None else number].to(device)

        replica = self.world.rank // layout.ranks_per_replica
        numbers = trainee.strategy.deal(batches.tokens, layout.replicas)[replica]
        return Work(numbers, batches.tokens, batch, begin, trainee.autocast, share, scale)

    def _rank_seconds(self) -> tuple[float, ...]:
        """What each rank spent on its own passes."""
        return tuple(number / 1e6 for number in self.world.numbers([round(self.clock.own_seconds() * 1e6)]))

    def _together(self, mine: dict[int, torch.Tensor] | None, count: int) -> torch.Tensor | None:
        """One number for each of `count` micro-batches, from the ranks that have computed them; None when any rank has
        failed to. On the CPU.
        """
        values = torch.zeros(count + 1, dtype=torch.float64)
        if mine is None:
            values[count] = 1
        elif mine:
            values[list(mine)] = torch.stack(list(mine.values())).double().cpu()
        values = self.world.sum(values)
        return None if values[count] else values[:count]

    def _clipped(self) -> torch.Tensor:
        """The norm of the whole gradient, which is clipped to what the recipe allows."""
        trainee = self.trainee
        if trainee.in_backward is not None:
            return trainee.in_backward.norm()
        trainee.scaler.unscale_(trainee.optimizer)
        limit = self.section.max_grad_norm or math.inf
        norm = trainee.strategy.norm(trainee.held)
        if isinstance(trainee.optimizer, AdamW16):
            trainee.optimizer.clip(limit, float(norm))
        else:
            # In 32 bits: by a number in 64 each gradient would be multiplied by a kernel of its own.
            torch.nn.utils.clip_grads_with_norm_([p for _, p in trainee.named], limit, norm.float())
        return norm

    def _update(self, loss: float, norm: float, shares: torch.Tensor, batches: MicroBatches, index: int) -> bool:
        """Change the weights, unless the loss forbids it. Returns whether it was skipped."""
        trainee = self.trainee
        verdict = self.watch.verdict(loss)
        # An overflow is fp16's daily bread while the scaler can still scale down; below 1 it is no overflow.
        overflow = trainee.scaler.is_enabled() and not math.isfinite(norm) and trainee.scaler.get_scale() >= 1
        if not math.isfinite(norm) and not overflow:
            verdict = "nan"
        skipped = overflow
        if verdict != "ok":
            skipped = self._object(verdict, loss, norm, shares, batches, index)
        if not skipped:
            self._gate(index)
            try:
                trainee.scaler.step(trainee.optimizer)
            except (RuntimeError, MemoryError) as error:  # some weights may have moved: it cannot be done again
                self.ladder.caught(error, index, again=False)
        trainee.scaler.update()
        trainee.optimizer.zero_grad(set_to_none=True)
        return skipped

    def _gate(self, index: int) -> None:
        """Look at every gradient of the first steps that count."""
        if self.gated == GATED:
            return
        self.gated += 1
        trainee = self.trainee
        alive = None if trainee.in_backward is None else trainee.in_backward.alive() | self.waiting
        for name in gradient_gate(trainee.named, index, self.world, trainee.names, alive)[:1]:
            self.trainee.say(
                tr("Some experts saw no token in this step, for example {name}.", name=name), step=index + 1
            )

    def _object(
        self, verdict: str, loss: float, norm: float, shares: torch.Tensor, batches: MicroBatches, index: int
    ) -> bool:
        """A loss that is not finite or jumps: stop, skip or only say so, and name the examples. True = skip."""
        policy = self.section.on_nan if verdict == "nan" else self.section.on_spike
        guilty = [number for number, share in enumerate(shares.tolist()) if not math.isfinite(share)]
        guilty = guilty or [int(shares.argmax())]
        names = tuple(str(self.train.origin(i)) for number in guilty for i in batches.examples(number))
        what = (
            tr("The loss ({loss}) or the gradient norm ({norm}) is not finite.", loss=loss, norm=norm)
            if verdict == "nan"
            else tr("The loss jumped to {loss:.3f}.", loss=loss)
        )
        self.trainee.emit(Notice(level="warning", text=what, step=index + 1, examples=names))
        if policy == "stop":
            self.trainee.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                what + " " + tr("Examples: {names}", names=", ".join(names[:8]) + (" …" if len(names) > 8 else "")),
                where=tr("step {step}", step=index + 1),
                remedy=self._remedy(),
            )
        return policy == "skip"

    def _remedy(self) -> str:
        """What can be done about a step that must not count."""
        in_backward = self.trainee.in_backward
        if in_backward is None or not in_backward.moved:
            return tr(
                "Look at them with `kitaeru data check`, lower train.learning_rate, or go on past such steps with "
                "--set train.on_nan=skip (train.on_spike=skip). The last checkpoint is untouched."
            )
        last = next(reversed(checkpoint.available(self.folder)), None)
        return tr(
            "Weights had changed in the backward pass by then, so this step is lost. Look at the examples with "
            "`kitaeru data check`, lower train.learning_rate, and go on from the last checkpoint ({name}) with "
            "--resume; with --set train.step_in_backward=false gradients are looked at before they change anything.",
            name=tr("there is none yet") if last is None else last.name,
        )

    def _validate(self) -> bool:
        """Validate now; whether the loss is the lowest so far (before training there is nothing to be best)."""
        assert self.valid is not None
        started = time.perf_counter()
        loss, tokens = self.evaluate(self.valid)
        best = self.progress.step > 0 and loss < self.progress.best_loss
        if best:
            self.progress.best_loss, self.progress.best_step, self.progress.since_best = loss, self.progress.step, 0
        elif self.progress.step > 0:
            self.progress.since_best += 1
        self.trainee.emit(
            Evaluated(
                step=self.progress.step, loss=loss, tokens=tokens, seconds=time.perf_counter() - started, best=best
            )
        )
        return best

    def evaluate(self, corpus: Corpus) -> tuple[float, int]:
        """Mean loss in nats over the trained tokens of `corpus`, and their number."""
        while True:
            batches = eval_batches(
                corpus,
                micro_batch_tokens=self.trainee.plan.layout.micro_batch_tokens,
                packing=self.trainee.plan.recipe.data.packing,
                max_examples=self.section.eval_max_examples,
            )
            loss = self.mean_loss(batches)
            if loss is not None:
                return loss, batches.trained_tokens
            self.ladder.down(self.progress.step)

    @torch.no_grad()
    def mean_loss(self, batches: MicroBatches) -> float | None:
        """Mean loss in nats over the trained tokens of micro-batches; None when memory ran out."""
        trainee = self.trainee
        trainee.model.eval()
        work = self._work(batches, lambda _: self.world.pulse.working(self.progress.step), lambda loss: loss)
        sums = self._passes(lambda: trainee.strategy.losses(trainee.held, work))
        self.world.pulse.waiting()
        losses = self._together(sums, len(batches))
        return None if losses is None else float(losses.sum()) / batches.trained_tokens

    def _given_up(self) -> bool:
        """Whether early stop has had enough; asked before a step too, for a run that is resumed there."""
        patience = self.section.early_stop
        return patience is not None and self.progress.since_best >= patience

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.total or (every is not None and step % every == 0)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the step, save and stop; a second one stops at once."""

        def remember(number: int, _: object) -> None:
            now = time.monotonic()
            if self.stop_signal is not None:
                if self.world.size > 1 and now - self.signalled < SAME_SIGNAL_SECONDS:
                    return
                raise KeyboardInterrupt
            self.stop_signal, self.signalled = number, now
            self.trainee.say(tr("Stopping after this step; it is saved first. Once more stops at once."), "warning")

        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _shortest(batches: MicroBatches) -> int:
    """The micro-batch that costs a rank least when it only has to keep in step."""
    return min(range(len(batches)), key=lambda number: batches.tokens[number])
