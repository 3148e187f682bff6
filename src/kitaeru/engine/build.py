"""From a plan to something that can be trained: one tuple of passes, in order.

Each pass takes the `Trainee` and fills in its part. Reading `PASSES` from top to bottom is reading how a model is made
ready.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kitaeru.data.types import MicroBatch
from kitaeru.engine.in_backward import InBackward
from kitaeru.engine.optim import build_optimizer
from kitaeru.errors import TrainingError
from kitaeru.events import Listener, Notice
from kitaeru.hardware import Hardware
from kitaeru.i18n import N_, tr
from kitaeru.kernels import flash
from kitaeru.machine.measure import Bench
from kitaeru.machine.probe import host_memory
from kitaeru.model import attention
from kitaeru.model import fused as fusing
from kitaeru.model.adapt import add_adapter
from kitaeru.model.head import LossSum, distance, forward_arguments, recognise_head
from kitaeru.model.layers import Draws, checkpoint_by_layer
from kitaeru.model.load import DTYPES, load_config, load_model
from kitaeru.model.offload import Host
from kitaeru.model.parts import Parts, outline
from kitaeru.model.rounded import RoundedLayer, round_products
from kitaeru.model.stages import share_of, stage_devices
from kitaeru.model.stream import load_streamed
from kitaeru.parallel import strategy_of
from kitaeru.parallel.start import hash_frozen
from kitaeru.parallel.types import Engine, Held, Named, Strategy, Unit
from kitaeru.parallel.world import World
from kitaeru.plan.deepspeed import deepspeed_config
from kitaeru.plan.fused import is_fused
from kitaeru.plan.host import HOST_ITEMS
from kitaeru.plan.layouts import DISK, ZERO
from kitaeru.plan.memory import CPU_PROCESS_BYTES, GPU_PROCESS_HOST_BYTES
from kitaeru.plan.rounded import is_rounded
from kitaeru.plan.stored import trains_from_ram
from kitaeru.plan.types import Plan

T = TypeVar("T")

# For which each flash attention is timed.
FLASH_SECONDS = 0.05


@dataclass
class Trainee:
    """Everything the loop needs. `named` are the trained parameters of this rank, by name, in a fixed order; where a
    strategy keeps them in pieces, this rank's pieces. `names` are all that are trained, on whatever rank.
    """

    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    emit: Listener
    device: torch.device
    world: World = field(default_factory=World)
    strategy: Strategy = field(init=False)
    held: Held = field(init=False)
    causal_lm: PreTrainedModel = field(init=False)
    model: PreTrainedModel | PeftModel = field(init=False)
    named: list[tuple[str, nn.Parameter]] = field(init=False)
    names: list[str] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    in_backward: InBackward | None = None
    draws: Draws = field(default_factory=Draws)
    parts: Parts | None = None
    frozen_hash: int = 0
    fused: tuple[fusing.FusedLayer, ...] = ()
    rounded: tuple[RoundedLayer, ...] = ()
    stored_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.strategy = strategy_of(self.plan.layout)

    @property
    def loss_sum(self) -> LossSum:
        """The loss sum of a micro-batch."""
        return self.held.unit

    def inside(self, function: Callable[[], T]) -> T:
        """Call a function that uses the model's weights, wherever they are; all ranks do so together."""
        return self.strategy.inside(self.held, function)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The arithmetic of the plan: autocast in 16 bits, nothing in fp32."""
        precision = self.plan.layout.precision
        # A weight is read once a pass: where memory is short, its copy in 16 bits is not held until the pass is over.
        cache = not self.plan.layout.step_in_backward
        with torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32", cache_enabled=cache):
            yield

    def say(self, text: str, level: str = "info", step: int = 0) -> None:
        """Emit a notice."""
        self.emit(Notice(level=level, text=text, step=step))


def build(
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    emit: Listener,
    progress: Callable[[str], None] | None = None,
    world: World | None = None,
) -> Trainee:
    """A model on its device, adapted, checked, with its loss and optimizer, as the plan says."""
    trainee = Trainee(plan, tokenizer, emit, training_device(plan), world or World())
    for step, title in PASSES:
        if progress is not None:
            progress(tr(title))
        step(trainee)
    return trainee


def training_device(plan: Plan) -> torch.device:
    """The device this process trains on; a GPU by its index, which some of torch's calls insist on. A run on one GPU
    goes to the roomiest of the planned machine.
    """
    if plan.layout.device == "cpu":
        return torch.device("cpu")
    roomiest = Hardware.from_dict(plan.hardware).roomiest if plan.hardware else None
    if plan.layout.devices == 1 and roomiest is not None and roomiest.index < torch.cuda.device_count():
        torch.cuda.set_device(roomiest.index)
    return torch.device("cuda", torch.cuda.current_device())


def load(trainee: Trainee) -> None:
    """Load the base model."""
    recipe = trainee.plan.recipe
    if recipe.limits.threads is not None:
        torch.set_num_threads(recipe.limits.threads)
    if trainee.device.type == "cuda" and recipe.limits.memory_gb is not None:
        share = recipe.limits.memory_gb * 1e9 / torch.cuda.get_device_properties(trainee.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), trainee.device)
    trainee.stored_dtype = load_config(recipe.model).dtype
    layout = trainee.plan.layout
    _check_ram(trainee)
    if layout.variant == DISK:
        assert recipe.limits.offload_folder is not None
        folder = Path(recipe.limits.offload_folder)
        trainee.causal_lm = load_streamed(
            recipe.model, base=layout.base, precision=layout.precision, device=trainee.device, folder=folder
        )
    elif layout.strategy in ("fsdp", "tensor", "zero3") or trains_from_ram(layout):
        trainee.causal_lm, trainee.parts = outline(recipe.model, layout, recipe.lora, recipe.train.seed)
    else:
        part, devices = share_of(layout, trainee.world.rank), stage_devices(layout)
        trainee.causal_lm = load_model(recipe.model, layout, recipe.train.seed, part, devices)
    trainee.causal_lm.config.use_cache = False
    vocabulary = trainee.causal_lm.get_input_embeddings().weight.shape[0]
    if len(trainee.tokenizer) > vocabulary:
        raise TrainingError(
            tr(
                "The tokenizer knows {tokens} tokens, the model only {rows}.",
                tokens=len(trainee.tokenizer),
                rows=vocabulary,
            ),
            remedy=tr("Use the model's own tokenizer (leave `model.tokenizer` out)."),
        )


def _check_ram(trainee: Trainee) -> None:
    """Where training leans on RAM, look whether what was planned is still free: with too little a system ends processes
    without a word.

    Raises:
        TrainingError: it is not.
    """
    chosen, world = trainee.plan.chosen, trainee.world
    if not trains_from_ram(chosen.layout) or not chosen.host:
        return
    hosts = len(set(world.each_of(world.host)))
    own = CPU_PROCESS_BYTES if chosen.layout.device == "cpu" else GPU_PROCESS_HOST_BYTES  # which are taken already
    need, free = (chosen.host_bytes - own * chosen.layout.processes) // hosts, host_memory()[1]
    if world.any(need > free):
        items = ", ".join(f"{tr(HOST_ITEMS[name])} {size / 1e9:.0f} GB" for name, size in chosen.host.items())
        raise TrainingError(
            tr(
                "Too little RAM is free: {need:.0f} GB are needed, {free:.0f} GB are there.",
                need=need / 1e9,
                free=free / 1e9,
            ),
            where=items,
            remedy=tr(
                "End what else runs on this machine and start again; or --set train.optimizer=adamw_16bit, a smaller "
                "model, or --set method=lora."
            ),
        )


def choose_attention(trainee: Trainee) -> None:
    """Let the fastest attention kernel that is there, and right for this model's heads, be taken; the main process
    decides for all.
    """
    config = trainee.causal_lm.config
    sixteen = DTYPES[trainee.plan.layout.precision]
    if config._attn_implementation != attention.NAME or sixteen == torch.float32:
        return
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    sights = tuple({attention.sight_of(config, layer): None for layer in range(config.num_hidden_layers)})
    shape = flash.Shape(heads, getattr(config, "num_key_value_heads", None) or heads, width, width**-0.5, sights)
    timer = Bench(trainee.device, FLASH_SECONDS, quick=True).time
    tried = trainee.world.said(flash.settle(shape, trainee.device, timer, sixteen) if trainee.world.main else [])
    if not tried:
        return
    right = math.isfinite(tried[0].seconds)
    if not trainee.world.main:
        flash.use(tried[0].name if right else None)
    took = ", ".join(
        f"{t.title} {1000 * t.seconds:.2f} ms" if math.isfinite(t.seconds) else f"{t.title} – ({t.why})" for t in tried
    )
    if not right:
        trainee.say(
            tr("Attention is computed an example at a time, slower than planned: {took}.", took=took), "warning"
        )
        return
    trainee.say(
        tr("Attention is computed by {name}, the fastest that is installed: {took}.", name=tried[0].title, took=took)
    )


def check_packing(trainee: Trainee) -> None:
    """Prove that packed examples do not see each other, and that the attention kernel is right for this model.

    Two examples packed, with the kernel that will train, must give what each gives alone with the model's own code.
    Being mixed or a wrong kernel changes logits by a third or so, 16-bit rounding by a few hundredths.
    """
    model = trainee.causal_lm
    trainee.model.eval()
    pair = _probe(trainee, (9, 6))
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")
    alone = _probe_alone(trainee, pair)
    model.set_attn_implementation(kernel)
    packing = trainee.plan.recipe.data.packing
    apart = distance(_probe_logits(trainee, pair) if packing else _probe_alone(trainee, pair), alone)
    exact = trainee.plan.layout.precision == "fp32" and trainee.plan.layout.base == "none"
    if not apart <= (1e-4 if exact else 0.1):
        if kernel == attention.NAME:
            model.set_attn_implementation(attention.own_kernel(model.config) if model._supports_sdpa else "eager")
            check_packing(trainee)
        elif kernel != "eager":
            model.set_attn_implementation("eager")
            check_packing(trainee)
            trainee.say(tr("Attention is computed by the model's own code: {kernel} is wrong for it.", kernel=kernel))
        elif packing:
            raise TrainingError(
                tr("This model mixes packed examples: they change its output by {percent:.2f} %.", percent=100 * apart),
                remedy=tr("Train it without packing: --set data.packing=false"),
            )


def adapt(trainee: Trainee) -> None:
    """Add the adapter, or free every weight."""
    recipe, model = trainee.plan.recipe, trainee.causal_lm
    if trainee.plan.layout.method in ("lora", "qlora"):
        model.requires_grad_(False)
        trainee.model = add_adapter(model, recipe.lora, recipe.train.seed)
    else:
        model.requires_grad_(True)
        trainee.model = model
    trainee.named = [(n, p) for n, p in trainee.model.named_parameters() if p.requires_grad]
    trainee.names = [name for name, _ in trainee.named]


def share_out(trainee: Trainee) -> None:
    """Put the model where the strategy trains it, after making sure that all ranks start from the same weights.

    Raises:
        TrainingError: they have loaded different ones.
    """
    trainee.held = trainee.strategy.hold(
        Unit(trainee.model, trainee.parts, _engine(trainee)), trainee.named, trainee.world, trainee.plan.layout
    )
    trainee.named = trainee.held.named
    for text in trainee.held.notices:
        trainee.say(text, "warning")
    trainee.frozen_hash = hash_frozen(trainee.model)


def _engine(trainee: Trainee) -> Engine | None:
    """What DeepSpeed's engine is set up with."""
    plan = trainee.plan
    if plan.layout.strategy not in ZERO:
        return None
    config = deepspeed_config(plan.layout, plan.recipe, plan.chosen.trained_parameters)
    return Engine(config, partial(_optimizer, trainee))


def seed_layers(trainee: Trainee) -> None:
    """Make dropout in a layer independent of the layers before it."""
    adapter = trainee.plan.recipe.lora.dropout if trainee.plan.layout.method in ("lora", "qlora") else 0.0
    own = (module.p for module in trainee.causal_lm.modules() if isinstance(module, nn.Dropout))
    if max((adapter, getattr(trainee.causal_lm.config, "attention_dropout", None) or 0.0, *own)) > 0:
        trainee.draws.attach(trainee.causal_lm)


def fuse_layers(trainee: Trainee) -> None:
    """Make every layer one operation, where the plan says so and they turn out to be what kitaeru thinks."""
    layout = trainee.plan.layout
    if layout.arithmetic == "plain" or not is_fused(layout):
        return
    model = trainee.causal_lm
    batch = _probe(trainee, (64, 64))
    trainee.model.eval()
    with trainee.autocast():
        done = fusing.fuse(
            model,
            layout.arithmetic,
            keep8=layout.activations == "keep8",
            recompute=layout.again(model.config.num_hidden_layers),
            host=Host(trainee.device) if layout.activations == "offload" else None,
            probe=lambda: getattr(model, model.base_model_prefix)(**forward_arguments(batch)),
        )
    trainee.fused = done.layers
    if not done.layers:
        trainee.held.replays = None  # the models' own code may wait for the device
    wide = sum(layer.qkv.arithmetic == "16bit" for layer in done.layers)
    if done.why_not is not None:
        why = tr("The layers run by the model's own code, slower than planned: {why}.", why=done.why_not)
        trainee.say(why, "warning")
    elif layout.arithmetic != "16bit" and wide:
        trainee.say(tr("{count} layers lose too much in 8 bits and are computed in 16.", count=wide), "warning")


def round_trained_products(trainee: Trainee) -> None:
    """Compute the layers' trained products in 8 bits, where the plan says so."""
    layout = trainee.plan.layout
    if layout.arithmetic == "plain" or not is_rounded(layout):
        return
    trainee.rounded = round_products(trainee.causal_lm, layout.arithmetic, DTYPES[layout.precision])
    if not trainee.rounded:
        why = tr("No linear layer of this model can be computed in 8 bits: all are in 16, slower than planned.")
        trainee.say(why, "warning")


def checkpoint_activations(trainee: Trainee) -> None:
    """Recompute activations where the plan says so, layer by layer; fused layers, and those that come from disk or
    RAM, do so themselves.
    """
    layout, model = trainee.plan.layout, trainee.causal_lm
    again = layout.again(model.config.num_hidden_layers)
    if trainee.fused or layout.variant == DISK or trains_from_ram(layout) or not again:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not layout.recomputed and layout.activations != "offload":
        return
    host = Host(trainee.device) if layout.activations == "offload" else None
    if not checkpoint_by_layer(model, again, host):
        trainee.say(tr("This model's layers are computed again all or none: all are, from inputs on the device."))


def attach_neftune(trainee: Trainee) -> None:
    """Add NEFTune's noise to the embeddings."""
    alpha = trainee.plan.recipe.train.neftune_alpha
    if alpha is None:
        return

    bounds: list[Tensor] = []  # of the micro-batch in the works

    def see_bounds(_: nn.Module, __: Any, arguments: dict[str, Any]) -> None:
        bounds[:] = [arguments["cu_seq_lens_q"]] if "cu_seq_lens_q" in arguments else []

    def add_noise(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not module.training or not bounds:
            return output
        lengths = bounds[0].diff()  # each example's own, so that packing does not thin the noise out
        size = alpha / (lengths * output.shape[-1]).float().sqrt().repeat_interleave(lengths)  # [T]
        return output + torch.empty_like(output).uniform_(-1, 1) * size.to(output.dtype)[:, None]

    decoder = getattr(trainee.causal_lm, trainee.causal_lm.base_model_prefix, trainee.causal_lm)
    decoder.register_forward_pre_hook(see_bounds, with_kwargs=True)
    trainee.causal_lm.get_input_embeddings().register_forward_hook(add_noise)


def choose_loss(trainee: Trainee) -> None:
    """Recognise the output head."""
    trainee.model.eval()
    probe = _probe(trainee, (9, 6))
    with trainee.autocast():
        trainee.held.unit.loss_sum, why = trainee.inside(
            lambda: recognise_head(trainee.causal_lm, probe, trainee.plan.recipe.train.z_loss)
        )
    if trainee.world.any(why not in ("chunked", "elsewhere")):
        trainee.say(tr("The loss is taken from the model's own logits: the chunked head does not fit it."))


def make_optimizer(trainee: Trainee) -> None:
    """Make the optimizer, unless the strategy drives one of its own."""
    trainee.optimizer = trainee.held.optimizer or _optimizer(trainee, trainee.named)
    enabled = trainee.plan.layout.precision == "fp16"
    trainee.scaler = torch.amp.GradScaler(trainee.device.type, enabled=enabled)
    if trainee.plan.layout.step_in_backward:
        trainee.in_backward = InBackward(trainee.optimizer, trainee.named)


def _optimizer(trainee: Trainee, named: Named) -> torch.optim.Optimizer:
    recipe, layout = trainee.plan.recipe, trainee.plan.layout
    assert recipe.train.learning_rate is not None
    return build_optimizer(
        named,
        recipe.train,
        learning_rate=recipe.train.learning_rate,
        lora_plus_ratio=recipe.lora.plus_ratio if layout.method in ("lora", "qlora") else None,
        device_type=named[0][1].device.type if named else layout.device,
        first_rows=trainee.held.first_rows if trains_from_ram(layout) else {},
    )


PASSES: tuple[tuple[Callable[[Trainee], None], str], ...] = (
    (load, N_("Loading the model")),
    (adapt, N_("Preparing the weights to train")),
    (share_out, N_("Sharing the model out")),
    (seed_layers, N_("Setting up random numbers")),
    (choose_attention, N_("Choosing the attention kernel")),
    (check_packing, N_("Checking that packed examples do not see each other")),
    (fuse_layers, N_("Fusing layers")),
    (round_trained_products, N_("Setting up products in 8 bits")),
    (checkpoint_activations, N_("Setting up recomputation")),
    (attach_neftune, N_("Setting up noise")),
    (choose_loss, N_("Checking the output head")),
    (make_optimizer, N_("Making the optimizer")),
)


def _probe(trainee: Trainee, lengths: tuple[int, ...]) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    ids = torch.randint(4, min(1000, len(trainee.tokenizer)), (1, total), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    targets = torch.roll(ids, -1, 1)
    ends = torch.tensor(lengths).cumsum(0)
    targets[0, ends - 1] = -100
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
    return MicroBatch(ids, positions, targets, starts, max(lengths)).to(trainee.device)


def _slice(batch: MicroBatch, start: int, end: int) -> MicroBatch:
    cut = slice(start, end)
    bounds = torch.tensor([0, end - start], dtype=torch.int32, device=batch.cu_seqlens.device)
    return MicroBatch(batch.input_ids[:, cut], batch.position_ids[:, cut], batch.targets[:, cut], bounds, end - start)


def _probe_alone(trainee: Trainee, pair: MicroBatch) -> Tensor:
    return torch.cat([_probe_logits(trainee, _slice(pair, a, b)) for a, b in ((0, 9), (9, 15))], dim=1)


def _probe_logits(trainee: Trainee, batch: MicroBatch) -> Tensor:
    with torch.no_grad(), trainee.autocast():
        logits: Tensor = trainee.inside(lambda: trainee.causal_lm(**forward_arguments(batch)).logits)
    return logits
