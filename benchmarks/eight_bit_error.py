"""What products in 8 bits do to a real model on real text: each site's error, the loss, and the adapter's gradients.

    python benchmarks/eight_bit_error.py MODEL_FOLDER --texts ja-text/valid.jsonl --out benchmarks/results/eight-bit.csv

In fp32 otherwise, so that nothing else is seen. A site's error is that of its result, of the median token. INT8 is
turned by Hadamard blocks before it is rounded (docs/notes/0019); "plain" is the same without. Also on a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from table import write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kitaeru.kernels.rows import Arithmetic, empty_rows, put_rows
from kitaeru.model import attention
from kitaeru.model.fused import fused_layer, install

LENGTH = 512
SITES = {"qkv": "self_attn.q_proj", "out": "self_attn.o_proj", "both": "mlp.gate_proj", "down": "mlp.down_proj"}
# What is computed in 16 bits; "keep": nothing, and gate and up are kept in 8 bits too.
WIDE: tuple[tuple[str, ...], ...] = ((), ("keep",), ("down",), ("qkv", "down"))


def rounded(values: Tensor, dtype: torch.dtype, *, plain: bool) -> Tensor:
    return put_rows(values, empty_rows(len(values), values.shape[1], 0, dtype, values, plain=plain)).values


def site_errors(model: Any, rows: Tensor, given: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Mean over layers of the median token's error, by site and way to round."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        for site, name in SITES.items():
            keep = seen.setdefault((index, site), [])
            hooks.append(
                layer.get_submodule(name).register_forward_pre_hook(
                    lambda _, a, keep=keep: keep.append(a[0].flatten(0, 1).detach())
                )
            )
    with torch.no_grad():
        for row in rows:
            model(input_ids=row[None], **given)
    for hook in hooks:
        hook.remove()
    ways = {"int8": (torch.int8, False), "int8 plain": (torch.int8, True), "fp8": (torch.float8_e4m3fn, True)}
    found: dict[tuple[str, str], list[float]] = {}
    for (index, site), inputs in seen.items():
        x, w = torch.cat(inputs), model.model.layers[index].get_submodule(SITES[site]).weight
        exact = x @ w.T
        for name, (dtype, plain) in ways.items():
            off = rounded(x, dtype, plain=plain) @ rounded(w.detach(), dtype, plain=plain).T - exact
            found.setdefault((site, name), []).append(float((off.norm(dim=1) / exact.norm(dim=1)).median()))
    return {key: sum(values) / len(values) for key, values in found.items()}


def losses(model: Any, whole: Any, rows: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean loss of each row, and all adapter gradients in one vector."""
    whole.zero_grad()
    found = []
    for row in rows:
        embedded = model.get_input_embeddings()(row).detach()[None].requires_grad_()
        logits = model(inputs_embeds=embedded, **given).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:])
        loss.backward()
        found.append(loss.detach().double())
    gradients = [p.grad.flatten() for p in whole.parameters() if p.grad is not None]
    return torch.stack(found), torch.cat(gradients).double()


def prepared(folder: Path, texts: Path, count: int) -> tuple[Any, Tensor, dict[str, Any]]:
    """The frozen model in fp32, `count` rows of `LENGTH` tokens, and what it is called with beside them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = texts.read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines)[: count * LENGTH * 6]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * LENGTH]
    rows = torch.tensor(ids, device=device).view(-1, LENGTH)
    starts = torch.tensor([0, LENGTH], dtype=torch.int32, device=device)
    given = {
        "position_ids": torch.arange(LENGTH, device=device)[None], "use_cache": False, "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts, "max_length_q": LENGTH, "max_length_k": LENGTH,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention.NAME).to(
        device
    )
    model.requires_grad_(False)
    return model, rows, given


def adapted(model: Any) -> Any:
    """The model with an adapter that is not nought."""
    torch.manual_seed(0)
    whole = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.005 * torch.randn_like(parameter)
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16, help=f"of {LENGTH} tokens")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, rows, given = prepared(arguments.model, arguments.texts, arguments.rows)
    table: list[tuple[str, str, str, float]] = []

    def say(what: str, site: str, way: str, value: float) -> None:
        table.append((what, site, way, value))
        print(f"{what:14} {site:12} {way:12} {value:+.5f}", flush=True)

    for (site, way), value in site_errors(model, rows[:2], given).items():
        say("error", site, way, value)
    whole = adapted(model)
    exact, gradient = losses(model, whole, rows, given)
    eight: tuple[Arithmetic, ...] = ("int8", "fp8")
    for way in eight:
        for wide in WIDE:
            removers: list[Callable[[], None]] = []
            for layer in model.model.layers:
                fused = fused_layer(layer, model.config, way, torch.float32)
                fused.keep = way if "keep" in wide else "16bit"
                for site in set(wide) & set(SITES):
                    fused.widen(site)
                removers.append(install(layer, fused))
            got, theirs = losses(model, whole, rows, given)
            for remove in removers:
                remove()
            kept = "none, keep8" if "keep" in wide else "+".join(wide) or "none"
            gaps = got - exact
            say("loss", kept, way, float(gaps.mean() / exact.mean()))
            say("loss stderr", kept, way, float(gaps.std() / len(gaps) ** 0.5 / exact.mean()))
            say("gradient cos", kept, way, float(torch.nn.functional.cosine_similarity(theirs, gradient, dim=0)))
    fields = ("model", "what", "in_16_bits_or_site", "way", "value")
    found = ((arguments.model.name, *row[:3], f"{row[3]:.6f}") for row in table)
    write(arguments.out, [dict(zip(fields, row, strict=True)) for row in found])


if __name__ == "__main__":
    main()
