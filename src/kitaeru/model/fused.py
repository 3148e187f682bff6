"""A decoder layer of the Llama or Gemma family with a frozen base and LoRA, as one operation with both passes written
out.

    n1 = norm(x)            qkv = n1 W + adapters     q, k turned       o = attention
    r  = x + o W + adapter  n2 = norm(r)              gate | up = n2 W + adapters
    y  = r + (act(gate) up) W + adapter

Gemma 2 and 3 norm what is added to the stream once more: r = x + norm(o W + adapter), and y likewise.

Backward needs n1, q, k, v, o, n2, gate and up: n1 and n2 are kept as the products read them (8 bits where these are in
8 bits, turned where these are), gate and up in 8 or 16 bits, and the residual stream not at all; of what is normed and
added the result, in the products' bits. Frozen weights are expanded from how they are stored into what a product reads,
for the time of that product.

It is put on a layer's instance after a comparison with the layer's own code; what does not fit is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from kitaeru.i18n import tr
from kitaeru.kernels.adapter import project
from kitaeru.kernels.gated import ACTIVATIONS, Activation, Kept, gated, gated_backward
from kitaeru.kernels.norm import Normed, add_normed, norm, norm_backward, sandwich
from kitaeru.kernels.packed_attention import PLAIN, Attended, Sight, attend, attend_backward
from kitaeru.kernels.rotary import Heads, rotate, rotate_backward
from kitaeru.kernels.rows import Arithmetic, Rows, round_rows, storage
from kitaeru.model.attention import sight_of
from kitaeru.model.head import distance
from kitaeru.model.offload import Host
from kitaeru.model.site import Site, UnfitError, site_of
from kitaeru.plan.fused import MLP_TOKENS


@dataclass(frozen=True)
class Place:
    """Where the tokens of a micro-batch stand: cos and sin [T, D], starts int32 [examples + 1], the longest example."""

    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor
    longest: int


@dataclass
class Mlp:
    """What the MLP keeps of some tokens for its backward pass."""

    thin_both: Tensor | None
    kept: Kept | None
    thin_down: Tensor | None
    added: Normed | None = None


@dataclass
class Saved:
    """What one layer keeps of a micro-batch for its backward pass; without `mlp` that part is computed again."""

    n1: Rows
    rstd1: Tensor
    thin_qkv: Tensor | None
    qkv: Tensor
    inverse: Tensor | None
    attended: Attended
    thin_o: Tensor | None
    added: Normed | None
    n2: Rows
    rstd2: Tensor
    mlp: Mlp | None = None


@dataclass
class FusedLayer:
    """The layer. `post1`, `post2`: weights of the norms of what is added to the stream, if there are any; `keep`: the
    numbers gate and up are kept in; `recompute`: keep only the input, and if there is a `host` there; without `on` the
    layer's own code runs.
    """

    qkv: Site
    out: Site
    both: Site
    down: Site
    norm1: Tensor
    norm2: Tensor
    eps: float
    heads: Heads
    scale: float
    activation: Activation
    post1: Tensor | None = None
    post2: Tensor | None = None
    sight: Sight = PLAIN
    keep: Arithmetic = "16bit"
    recompute: bool = False
    host: Host | None = None
    on: bool = True

    @property
    def in_8_bits(self) -> bool:
        """Whether its products are computed in 8 bits."""
        return self.both.arithmetic != "16bit"

    def widen(self, site: str) -> None:
        """Compute one of "qkv", "out", "both" and "down" in 16 bits from now on."""
        now: Site = getattr(self, site)
        setattr(self, site, Site(now.members, "16bit", now.compute))

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, in the order of `backward`'s gradients."""
        return [p for site in (self.qkv, self.out, self.both, self.down) for p in site.parameters]

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """[T, h] to [T, h]."""
        result: Tensor = _Layer.apply(hidden, self, place, torch.is_grad_enabled(), *self.parameters)  # type: ignore[no-untyped-call]
        return result

    def forward(self, x: Tensor, place: Place) -> tuple[Tensor, Saved]:
        """The result and what backward needs."""
        r, saved = self.attend(x, place)
        step, saved.mlp = self._mlp(saved.n2)
        assert step is not None
        saved.mlp.added = self._add(r, step)
        return r, saved

    def through(self, x: Tensor, place: Place) -> Tensor:
        """The result alone, the MLP a piece of the tokens at a time."""
        r, saved = self.attend(x, place)
        n2 = saved.n2
        del saved
        for piece in _pieces(len(r)):
            step, _ = self._mlp(n2.part(piece))
            assert step is not None
            self._add(r[piece], step)
            del step
        return r

    def attend(self, x: Tensor, place: Place) -> tuple[Tensor, Saved]:
        """The stream after attention [T, h], and what backward needs of it all but the MLP."""
        _, n1, rstd1 = norm(x, None, self.norm1, self.eps, self.qkv.dtype, self.qkv.extra)
        qkv, thin_qkv = self.qkv.forward(n1)
        inverse = rotate(qkv, place.cos, place.sin, self.heads)
        attended = attend(*self.heads.split(qkv), place.cu_seqlens, place.longest, self.scale, self.sight)
        o = round_rows(attended.output.detach().flatten(1), self.out.dtype, self.out.extra)
        step, thin_o = self.out.forward(o)
        del o
        then, added = (self.norm2, self.eps, self.both.dtype, self.both.extra), None
        if self.post1 is None:
            r, n2, rstd2 = norm(x, step, *then)
        else:
            r, added, n2, rstd2 = sandwich(x, step, self.post1, self.out.dtype, *then)
        return r, Saved(n1, rstd1, thin_qkv, qkv, inverse, attended, thin_o, added, n2, rstd2)

    def _add(self, r: Tensor | None, step: Tensor) -> Normed | None:
        """Add the MLP's result to the stream, in place; what backward needs of its norm."""
        if self.post2 is not None:
            return add_normed(r, step, self.post2, self.eps, self.down.dtype)
        if r is not None:
            r.add_(step)
        return None

    def _mlp(self, n2: Rows, *, finish: bool = True) -> tuple[Tensor | None, Mlp]:
        """The MLP's result, before its norm; without `finish` not its last product, which backward does not need."""
        both, thin_both = self.both.forward(n2)
        keep = storage(self.keep, both.dtype)
        active, kept = gated(both, self.activation, self.down.dtype, self.down.extra, keep)
        del both
        if finish:
            step, thin_down = self.down.forward(active)
            return step, Mlp(thin_both, kept, thin_down)
        return None, Mlp(thin_both, kept, project(active, self.down.thin()[0]) if self.down.rank else None)

    def _mlp_again(self, n2: Rows) -> Mlp:
        step, mlp = self._mlp(n2, finish=self.post2 is not None)
        if step is not None:
            mlp.added = self._add(None, step)
        return mlp

    def backward(self, dy: Tensor, s: Saved, place: Place, *, needs_input: bool) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of the input and of `parameters`."""
        d_n2, of_mlp = self._mlp_backward(dy, s)
        of_step = (None, 0) if self.post1 is not None else (self.out.dtype, self.out.extra)
        d_r, g2 = norm_backward(d_n2, s.n2, s.rstd2, self.norm2, dy, *of_step)
        assert d_r is not None
        del d_n2
        if self.post1 is not None:
            g2 = self._step_gradient(d_r, s.added, self.post1, self.out)
        assert g2 is not None
        s.n2 = s.added = None  # type: ignore[assignment]
        d_o, dthin = self.out.backward(g2)
        assert d_o is not None
        o = s.attended.output.detach().flatten(1)
        of_out = self.out.gradients(Rows(o, None, o.shape[1]), s.thin_o, dthin, g2)
        del g2, o
        d_parts = attend_backward(d_o.view(s.attended.output.shape), s.attended)
        del d_o
        d_qkv = rotate_backward(
            *d_parts, s.qkv, s.inverse, place.cos, place.sin, self.heads, self.qkv.dtype, self.qkv.extra
        )
        del d_parts
        s.qkv = s.attended = None  # type: ignore[assignment]
        d_n1, dthin = self.qkv.backward(d_qkv, needs_input=needs_input)
        of_qkv = self.qkv.gradients(s.n1, s.thin_qkv, dthin, d_qkv)
        del d_qkv
        dx = None
        if d_n1 is not None:
            dx, _ = norm_backward(d_n1, s.n1, s.rstd1, self.norm1, d_r, None, 0)
        return dx, [*of_qkv, *of_out, *of_mlp]

    def _mlp_backward(self, dy: Tensor, s: Saved) -> tuple[Tensor, list[Tensor]]:
        """The gradients of n2 and of the MLP's adapters; what was not kept is computed again, a piece of the tokens at
        a time.
        """
        pieces = _pieces(len(dy))
        if s.mlp is not None or len(pieces) == 1:
            mlp, s.mlp = s.mlp or self._mlp_again(s.n2), None
            return self._mlp_gradients(dy, s.n2, mlp)
        d_n2, total = torch.empty_like(dy), list[Tensor]()
        for piece in pieces:
            n2 = s.n2.part(piece)
            d_n2[piece], found = self._mlp_gradients(dy[piece], n2, self._mlp_again(n2))
            total = [a.add_(b) for a, b in zip(total, found, strict=True)] if total else found
        return d_n2, total

    def _step_gradient(self, dy: Tensor, added: Normed | None, post: Tensor, site: Site) -> Rows:
        """The gradient of a site's result, whose norm was added to the stream."""
        assert added is not None
        rows = norm_backward(dy, added.rows, added.rstd, post, None, site.dtype, site.extra)[1]
        assert rows is not None
        return rows

    def _mlp_gradients(self, dy: Tensor, n2: Rows, mlp: Mlp) -> tuple[Tensor, list[Tensor]]:
        assert mlp.kept is not None
        if self.post2 is None:
            g = round_rows(dy, self.down.dtype, self.down.extra)
        else:
            g = self._step_gradient(dy, mlp.added, self.post2, self.down)
        d_active, dthin = self.down.backward(g)
        assert d_active is not None
        d_both, active = gated_backward(d_active, mlp.kept, self.activation, self.both.dtype, self.both.extra)
        of_down = self.down.gradients(active, mlp.thin_down, dthin, g)
        del d_active, active, g
        mlp.kept = mlp.thin_down = mlp.added = None
        d_n2, dthin = self.both.backward(d_both)
        assert d_n2 is not None
        return d_n2, [*self.both.gradients(n2, mlp.thin_both, dthin, d_both), *of_down]


def _pieces(tokens: int) -> list[slice]:
    return [slice(start, start + MLP_TOKENS) for start in range(0, tokens, MLP_TOKENS)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FusedLayer, place: Place, keeps: bool, *_: Tensor) -> Tensor:
        ctx.layer, ctx.place = layer, place
        with torch.autocast(x.device.type, enabled=False):
            if keeps and not layer.recompute:
                result, ctx.kept = layer.forward(x, place)
                return result
            if keeps and layer.host is not None:
                ctx.kept = layer.host.put(x)
            elif keeps:
                ctx.save_for_backward(x)
            return layer.through(x, place)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        layer: FusedLayer = ctx.layer
        dy = upstream[0].contiguous()
        with torch.autocast(dy.device.type, enabled=False):
            if layer.recompute:
                x = ctx.saved_tensors[0] if layer.host is None else _once(ctx).take()
                saved = layer.attend(x, ctx.place)[1]  # the stream itself is not needed
                del x
            else:
                saved = _once(ctx)
            dx, gradients = layer.backward(dy, saved, ctx.place, needs_input=ctx.needs_input_grad[0])
        return dx, None, None, None, *gradients


def _once(ctx: Any) -> Any:
    """What the forward pass has left, which is used up now."""
    kept, ctx.kept = ctx.kept, None
    if kept is None:
        raise RuntimeError("the backward pass of this layer has run already")
    return kept


def fused_layer(layer: Any, config: PretrainedConfig, arithmetic: Arithmetic, compute: torch.dtype) -> FusedLayer:
    """What is computed by this decoder layer, if its parts have the names and types of the Llama or Gemma family.

    Raises:
        UnfitError: they have not.
    """
    parts = {name for name, _ in layer.named_children()}
    sandwiched = "pre_feedforward_layernorm" in parts
    names = ("input_layernorm", "pre_feedforward_layernorm" if sandwiched else "post_attention_layernorm")
    posts = ("post_attention_layernorm", "post_feedforward_layernorm") if sandwiched else ()
    try:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        norms = [getattr(layer, name) for name in (*names, *posts)]
        head_dim, scale, index = attention.head_dim, attention.scaling, attention.layer_idx
    except AttributeError as error:
        raise UnfitError(tr("a layer without {name}", name=error.name)) from error
    extra = parts - {"self_attn", "mlp", *names, *posts}
    if extra:
        raise UnfitError(tr("a part called {name}", name=min(extra)))
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    if (q_norm is None) != (k_norm is None) or (q_norm is not None and q_norm.weight.shape != (head_dim,)):
        raise UnfitError(tr("a norm over all heads"))
    if len({_eps(n) for n in norms}) > 1:
        raise UnfitError(tr("two norms of different kinds"))
    heads = Heads(
        config.num_attention_heads, config.num_key_value_heads, head_dim,
        None if q_norm is None else _weight(q_norm), None if k_norm is None else _weight(k_norm),
        1e-6 if q_norm is None else _eps(q_norm),
    )  # fmt: skip
    first, second, *others = (_weight(n) for n in norms)
    return FusedLayer(
        qkv=site_of(projections, arithmetic, compute),
        out=site_of((attention.o_proj,), arithmetic, compute),
        both=site_of((gate, up), arithmetic, compute),
        down=site_of((down,), arithmetic, compute),
        norm1=first,
        norm2=second,
        eps=_eps(norms[0]),
        heads=heads,
        scale=scale,
        activation=_activation(mlp),
        post1=others[0] if others else None,
        post2=others[1] if others else None,
        sight=sight_of(config, index),
    )


def _eps(module: Any) -> float:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    raise UnfitError(tr("a norm without an epsilon"))


def _weight(norm: Any) -> Tensor:
    """What a norm multiplies by, by what it makes of ones: its weight, or, in fp32, 1 more than that."""
    weight: Tensor = norm.weight
    if weight.requires_grad:
        raise UnfitError(tr("a norm that is trained"))
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        found = norm(torch.ones_like(weight)[None])[0].float() * (1 + _eps(norm)) ** 0.5
        for candidate in (weight, weight.float() + 1):
            if torch.allclose(found, candidate.float(), rtol=0.01, atol=0.01):
                return candidate.detach()
    raise UnfitError(tr("a norm of another kind"))


def _activation(mlp: Any) -> Activation:
    """What an MLP's gate goes through, by its values."""
    act = getattr(mlp, "act_fn", None)
    gate = torch.linspace(-6, 6, 101)
    if callable(act):
        for name, known in ACTIVATIONS.items():
            if torch.allclose(act(gate), known(gate), rtol=0, atol=1e-5):
                return name
    raise UnfitError(tr("the activation {name}", name=type(act).__name__))


def install(layer: Any, fused: FusedLayer) -> Callable[[], None]:
    """Let packed micro-batches go through `fused`; everything else, generation with a cache say, goes the old way.

    Returns what takes it off again.
    """
    original = layer.forward

    def forward(hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        angles, starts = options.get("position_embeddings"), options.get("cu_seq_lens_q")
        suits = hidden_states.shape[0] == 1 and hidden_states.dtype == fused.qkv.compute
        cached = options.get("past_key_values") is not None
        if not fused.on or arguments or angles is None or starts is None or cached or not suits:
            return original(hidden_states, *arguments, **options)
        cos, sin = angles
        return fused(hidden_states.squeeze(0), Place(cos[0], sin[0], starts, options["max_length_q"]))[None]

    layer.forward = forward

    def remove() -> None:
        layer.forward = original

    return remove


# How far a fused layer's change of the stream, and of its gradient, may be from the layer's own, as a share of its
# size. Another function would be off by one and more. A layer that is further off in 8 bits is computed in 16.
CLOSE: dict[Arithmetic, float] = {"16bit": 0.05, "fp8": 0.2, "int8": 0.2}
EXACT = 1e-3


@dataclass(frozen=True)
class Fusing:
    """What came of fusing: the layers, or why every layer stays as it is."""

    layers: tuple[FusedLayer, ...]
    why_not: str | None = None


def fuse(
    model: Any,
    arithmetic: Arithmetic,
    *,
    keep8: bool,
    probe: Callable[[], Any],
    recompute: int = 0,
    host: Host | None = None,
) -> Fusing:
    """Fuse all decoder layers of a causal language model, or none.

    The first `recompute` layers are computed again in the backward pass, from inputs that wait in `host` but for the
    last layer's, which is wanted at once. `probe` runs a few tokens through the model's decoder. Each layer is given
    what it saw there, both ways, before and after it is fused.
    """
    decoder = getattr(model, model.base_model_prefix)
    compute = model.get_input_embeddings().weight.dtype
    layers = [layer for layer in decoder.layers if not next(layer.parameters()).is_meta]  # another rank has the rest
    calls = _calls(layers, probe)
    found: list[FusedLayer] = []
    removers: list[Callable[[], None]] = []
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        expected = call(layer)
        for kind in dict.fromkeys((arithmetic, "16bit")):
            try:
                fused = fused_layer(layer, model.config, kind, compute)
            except UnfitError as reason:
                _take_off(removers)
                return Fusing((), str(reason))
            fused.recompute = index < recompute
            fused.keep = kind if keep8 and not fused.recompute else "16bit"
            fused.host = host if fused.recompute and index < len(layers) - 1 else None
            remove = install(layer, fused)
            offs = [distance(a, b) for a, b in zip(call(layer), expected, strict=True)]
            bound = EXACT if compute == torch.float32 and kind == "16bit" else CLOSE[kind]
            if all(off <= bound for off in offs):  # which nan is not
                removers.append(remove)
                found.append(fused)
                break
            remove()
        else:
            _take_off(removers)
            return Fusing((), tr("a fused layer is off by {share:.0%}", share=max(offs)))
    if host is not None:
        host.attach(decoder)
    _norm_in_pieces(getattr(decoder, "norm", None))
    return Fusing(tuple(found))


def _norm_in_pieces(last: nn.Module | None) -> None:
    """Let the norm after all layers, which computes in 32 bits, take a piece of many tokens at a time."""
    if last is None:
        return
    original: Callable[[Tensor], Tensor] = last.forward

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= MLP_TOKENS:
            return original(hidden)
        again = partial(checkpoint, original, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([again(piece) for piece in hidden.split(MLP_TOKENS, 1)], 1)

    last.forward = forward


def _take_off(removers: list[Callable[[], None]]) -> None:
    for remove in removers:
        remove()


Call = Callable[[Any], tuple[Tensor, Tensor]]


def _calls(layers: Any, probe: Callable[[], Any]) -> list[Call]:
    """For each layer, a call of it with what it saw in the probe: its change of the stream, and of a gradient."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def see(_: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        seen.append((arguments[0].detach(), options))

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        probe()
    for hook in hooks:
        hook.remove()

    def call_with(hidden: Tensor, options: dict[str, Any]) -> Call:
        up = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view(hidden.shape).to(hidden.dtype)
        autocast, kind = torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type)

        def call(layer: Any) -> tuple[Tensor, Tensor]:
            leaf = hidden.clone().requires_grad_()
            with torch.enable_grad(), torch.autocast(hidden.device.type, kind, enabled=autocast):
                output = layer(leaf, **options)
            (gradient,) = torch.autograd.grad(output, leaf, up)
            return output.detach().double() - hidden, gradient.double() - up

        return call

    return [call_with(hidden, options) for hidden, options in seen]
