"""Every method on the CPU: the loss falls, every gradient arrives, and what is written says what the trainer said."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from kitaeru.engine.result import write_result
from kitaeru.engine.schedule import rate
from kitaeru.model.load import keep_trainable_packing
from kitaeru.parallel.start import hash_frozen

IDS = torch.randint(4, 16000, (1, 24), generator=torch.Generator().manual_seed(1))
FAST = {"train__max_steps": 8, "train__learning_rate": 1e-2, "train__warmup_steps": 1}

ADAPTERS = {
    "lora": {},
    "qlora": {"method": "qlora"},
    "int8 base": {"base": "int8"},
    "dora": {"lora__dora": True},
    "dora on nf4": {"method": "qlora", "lora__dora": True},
    "rslora": {"lora__rslora": True, "lora__r": 4},
    "pissa": {"lora__init": "pissa", "lora__r": 4},
    "olora": {"lora__init": "olora", "lora__r": 4},
    "gaussian": {"lora__init": "gaussian"},
    "lora+": {"lora__plus_ratio": 8.0, "train__learning_rate": 3e-3},
    "two targets": {"lora__targets": ["q_proj", "down_proj"]},
    "with an embedding": {"lora__modules_to_save": ["embed_tokens"]},
    "with a norm": {"lora__modules_to_save": ["norm"]},
    "head too": {"lora__targets": ["q_proj", "lm_head"]},
}


@pytest.fixture(scope="module")
def untied_model(tiny_model, tmp_path_factory):
    """The tiny model with an output head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_plain_peft_and_gives_the_trainers_logits(
    name, training, tiny_model, untied_model, chat_data, tmp_path
):
    options = {**FAST, **ADAPTERS[name]}
    source = untied_model if name == "head too" else tiny_model
    made = training.Training(tmp_path, source, chat_data, options.pop("method", "lora"), **options)
    assert made.run() == "finished"
    assert made.losses[-1] < made.losses[0] - 0.1
    assert hash_frozen(made.trainee.model) == made.trainee.frozen_hash
    folder = write_result(made.trainee, tmp_path)
    assert folder == tmp_path / "adapter"
    trained = made.logits(IDS)
    quantised = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }.get(made.plan.layout.base)
    base = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantised, attn_implementation="eager", dtype=torch.float32
    )
    keep_trainable_packing(base)  # bitsandbytes' CPU kernel for inference rounds to 16 bits
    untrained = base(input_ids=IDS).logits.detach()
    again = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        loaded = again(input_ids=IDS).logits
    assert not torch.allclose(trained, untrained, atol=1e-2)
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("method", ["full", "pretrain"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_model_loads_plainly_and_gives_the_trainers_logits(
    method, precision, training, tiny_model, chat_data, tmp_path
):
    made = training.Training(tmp_path, tiny_model, chat_data, method, precision=precision, **FAST)
    assert made.run() == "finished"
    assert made.losses[-1] < made.losses[0] - 0.3
    assert all(p.dtype == torch.float32 for _, p in made.trainee.named)  # the masters
    folder = write_result(made.trainee, tmp_path)
    assert folder == tmp_path / "model"
    again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert again.dtype == torch.float32  # as tiny_model is stored
    assert again.config.use_cache
    torch.testing.assert_close(again(input_ids=IDS).logits, made.logits(IDS), rtol=1e-5, atol=1e-5)


def test_a_model_stored_in_16_bits_comes_back_in_16_bits(training, tiny_model, chat_data, tmp_path):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(half)
    made = training.Training(tmp_path / "run", half, chat_data, "full", **FAST)
    made.run()
    again = AutoModelForCausalLM.from_pretrained(write_result(made.trainee, tmp_path / "run"), dtype="auto")
    assert again.dtype == torch.bfloat16
    rounded = {n: p.to(torch.bfloat16) for n, p in made.trainee.named}
    assert all(torch.equal(p, rounded[n]) for n, p in again.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "adafactor"])
def test_every_optimizer_learns_and_goes_on_bit_for_bit(optimizer, training, tiny_model, chat_data, tmp_path):
    rates = {"lion": 3e-3}
    options = {
        **FAST,
        "train__optimizer": optimizer,
        "train__learning_rate": rates.get(optimizer, 1e-2),
        "train__save_every": 4,
        "train__weight_decay": 0.01,
        "lora__dropout": 0.1,
        "train__neftune_alpha": 5.0,
    }
    whole = training.Training(tmp_path, tiny_model, chat_data, **options)
    whole.run()
    assert whole.losses[-1] < whole.losses[0] - 0.1
    second = training.Training(tmp_path, tiny_model, chat_data, **options)
    second.loop.restore(tmp_path / "checkpoints" / "step-00000004")
    second.run()
    assert second.losses == whole.losses[4:]
    assert all(torch.equal(w, second.weights()[n]) for n, w in whole.weights().items())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_bf16_learns_with_a_16_bit_base_and_a_32_bit_adapter(method, training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data, method, precision="bf16", **FAST)
    assert made.run() == "finished"
    assert made.losses[-1] < made.losses[0] - 0.1
    assert all(p.dtype == torch.float32 for _, p in made.trainee.named)
    assert made.trainee.causal_lm.get_input_embeddings().weight.dtype == torch.bfloat16
    folder = write_result(made.trainee, tmp_path)
    if method == "lora":
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16, attn_implementation="eager")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            loaded = PeftModel.from_pretrained(base, folder).eval()(input_ids=IDS).logits
            trained = made.logits(IDS)
        torch.testing.assert_close(loaded.float(), trained.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_recomputing_activations_changes_nothing(method, training, tiny_model, chat_data, tmp_path):
    runs, calls = [], []
    for activations in ("keep", "recompute"):
        changes = {"lora__dropout": 0.1} if method != "full" else {}
        made = training.Training(
            tmp_path / activations, tiny_model, chat_data, method, activations=activations, **changes
        )
        count = [0]
        made.trainee.causal_lm.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        made.run()
        runs.append(made)
        calls.append(count[0])
    assert calls[1] == 2 * calls[0]  # forward, and once more for backward
    assert runs[0].losses == runs[1].losses
    assert all(torch.equal(w, runs[1].weights()[n]) for n, w in runs[0].weights().items())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_the_schedule_is_applied(schedule, training, tiny_model, chat_data, tmp_path):
    made = training.Training(
        tmp_path, tiny_model, chat_data, train__schedule=schedule, train__max_steps=5, train__warmup_steps=2
    )
    rates, step = [], made.trainee.optimizer.step

    def look(*args, **kwargs):
        rates.append([group["lr"] for group in made.trainee.optimizer.param_groups])
        return step(*args, **kwargs)

    made.trainee.optimizer.step = look
    made.run()
    expected = [2e-3 * rate(i, 5, made.recipe.train) for i in range(5)]
    assert [s.learning_rate for s in made.steps] == pytest.approx(expected)
    assert [r[0] for r in rates] == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_lora_plus_gives_b_its_own_rate(training, tiny_model, chat_data, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data, lora__plus_ratio=16.0)
    names = {id(p): n for n, p in made.trainee.named}
    for group in made.trainee.optimizer.param_groups:
        is_b = {"lora_B" in names[id(p)] for p in group["params"]}
        assert is_b == {group["name"] == "lora_b"}
        assert group["initial_lr"] == pytest.approx(2e-3 * (16 if group["name"] == "lora_b" else 1))


@pytest.mark.parametrize("change", [{"lora__dropout": 0.3}, {"train__neftune_alpha": 10.0}])
def test_noise_is_drawn_from_the_seed_and_only_in_training(
    change, training, tiny_model, chat_data, valid_data, tmp_path
):
    def run(name, **more):
        made = training.Training(tmp_path / name, tiny_model, chat_data, data__valid=str(valid_data), **more)
        before = made.loop.evaluate(made.data.valid)
        made.run()
        return made, before

    one, quiet = run("one", **change)
    again, quiet_again = run("again", **change)
    plain, quiet_plain = run("plain")
    assert quiet == quiet_again == quiet_plain  # the same before training, noise or not
    assert one.losses == again.losses
    if "train__neftune_alpha" in change:
        assert one.losses[0] != plain.losses[0]
    assert one.losses[1:] != plain.losses[1:]


def test_qlora_goes_on_learning_after_a_validation(training, tiny_model, chat_data, valid_data, tmp_path):
    """bitsandbytes repacks 4-bit weights for inference in evaluation mode on some CPUs, and gradients end there."""
    made = training.Training(
        tmp_path, tiny_model, chat_data, "qlora", precision="bf16", data__valid=str(valid_data), train__eval_every=1
    )
    for module in made.trainee.causal_lm.modules():
        assert not getattr(module, "support_avx512bf16_for_cpu", False)
    made.loop.evaluate(made.data.valid)
    batches = made.loop._split([0, 1, 2])
    made.loop._gradients(batches, batches.trained_tokens, 0)
    first = [n for n, p in made.trainee.named if "layers.0" in n and "lora_B" in n and not bool(p.grad.any())]
    assert first == []
    made.trainee.optimizer.zero_grad()
    made.run()
    assert all(math.isfinite(s.grad_norm) and s.grad_norm > 0 for s in made.steps)
