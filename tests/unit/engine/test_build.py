"""The passes that make a model ready: packing proved, adapters, recomputation, noise, the frozen hash."""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kitaeru.data.batches import micro_batches
from kitaeru.engine import build as building
from kitaeru.engine.build import check_packing, training_device
from kitaeru.errors import TrainingError
from kitaeru.hardware import parse_gpus
from kitaeru.model import attention
from kitaeru.model.head import distance, forward_arguments, plain_loss
from kitaeru.parallel.start import hash_frozen
from kitaeru.plan.types import Candidate, Layout, Plan
from kitaeru.recipe.types import Recipe

SIZE = {
    "vocab_size": 16384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
WINDOW = 8  # shorter than every example
SHAPES = {
    "llama": (LlamaConfig(**SIZE), attention.NAME, True),
    "qwen3": (Qwen3Config(**SIZE), attention.NAME, True),
    "mixtral": (
        MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        attention.NAME,
        True,
    ),
    "mistral": (MistralConfig(**SIZE, sliding_window=WINDOW), attention.NAME, True),
    "gemma2": (
        Gemma2Config(
            **SIZE,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
        ),
        attention.NAME,
        True,
    ),
    "gemma3": (
        Gemma3TextConfig(**SIZE, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
        attention.NAME,
        True,
    ),
    "cohere": (CohereConfig(**SIZE, logit_scale=0.25), attention.NAME, False),
}


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request, training, chat_data, tiny_model, tmp_path_factory):
    """A random model of each family, built by the engine to be trained from scratch."""
    config, _, _ = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config.save_pretrained(folder)
    made = training.Training(
        folder / "run", folder, chat_data, "pretrain", model__tokenizer=str(tiny_model), micro_batch_tokens=256
    )
    with torch.no_grad():  # far from the uniform prediction of a fresh model
        made.trainee.causal_lm.get_output_embeddings().weight.mul_(20)
    return request.param, made


def test_each_family_gets_the_attention_that_keeps_its_examples_apart(shaped):
    name, made = shaped
    assert made.trainee.causal_lm.config._attn_implementation == SHAPES[name][1]


def test_packed_and_alone_give_the_same_loss_of_each_example(shaped):
    _, made = shaped
    model = made.trainee.causal_lm.eval()
    indices = [0, 3, 7, 9, 11]
    [packed] = micro_batches(made.data.train, indices, micro_batch_tokens=512)
    assert min(packed.cu_seqlens.diff()) > WINDOW
    alone = {b.examples[0]: b for b in micro_batches(made.data.train, indices, micro_batch_tokens=512, packing=False)}
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(**forward_arguments(packed)).logits[0]
        bounds = packed.cu_seqlens.tolist()
        for example, begin, end in zip(packed.examples, bounds, bounds[1:], strict=False):
            together = nn.functional.cross_entropy(
                logits[begin:end], packed.targets[0, begin:end], ignore_index=-100, reduction="sum"
            )
            one = alone[example]
            plainly = reference(input_ids=one.input_ids, use_cache=False).logits[0]
            by_itself = nn.functional.cross_entropy(plainly, one.targets[0], ignore_index=-100, reduction="sum")
            assert float(together) == pytest.approx(float(by_itself), rel=1e-5)


def test_the_chunked_head_gives_the_models_own_loss_and_gradients(shaped):
    name, made = shaped
    trainee = made.trainee
    chunked = not made.notices
    assert chunked == SHAPES[name][2]
    [batch] = micro_batches(made.data.train, [1, 2, 5], micro_batch_tokens=512)
    results = []
    for loss_sum in (trainee.loss_sum, plain_loss(trainee.causal_lm)):
        trainee.model.zero_grad()
        loss = loss_sum(batch)
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in trainee.named if p.grad is not None}))
    (ours, our_grads), (theirs, their_grads) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert our_grads.keys() == their_grads.keys()
    for key, grad in their_grads.items():
        assert bool(grad.any()) == bool(our_grads[key].any())
        assert not grad.any() or distance(our_grads[key], grad) < 1e-4, key


def test_a_family_that_hides_something_from_its_config_is_found_out(training, chat_data, tiny_model, tmp_path):
    """GPT-OSS adds a sink to every softmax, also where all its layers are plain, and packs only with what we refuse."""
    config = GptOssConfig(
        **SIZE, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2, rope_scaling=None
    )
    assert attention.suits(config)
    config.save_pretrained(tmp_path)
    start = functools.partial(
        training.Training, tmp_path / "run", tmp_path, chat_data, "pretrain", model__tokenizer=str(tiny_model)
    )
    with pytest.raises(TrainingError, match="mixes packed examples"):
        start()
    made = start(data__packing=False)
    assert made.trainee.causal_lm.config._attn_implementation == "eager"


class Mixing(nn.Module):
    """Attention that forgets where examples end."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        length = kwargs["hidden_states"].shape[1]
        mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
        return self.inner(*args, **{**kwargs, "attention_mask": mask})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_mixes_packed_examples_is_refused(training, chat_data, tiny_model, tmp_path, precision):
    made = training.Training(tmp_path, tiny_model, chat_data, "full", precision=precision)
    made.trainee.causal_lm.set_attn_implementation("sdpa")
    for layer in made.trainee.causal_lm.model.layers:
        layer.self_attn = Mixing(layer.self_attn)
    with pytest.raises(TrainingError, match="mixes packed examples") as caught:
        check_packing(made.trainee)
    assert "data.packing=false" in str(caught.value)
    recipe = made.recipe.model_copy(update={"data": made.recipe.data.model_copy(update={"packing": False})})
    made.trainee.plan = dataclasses.replace(made.plan, recipe=recipe)
    check_packing(made.trainee)  # unpacked it may train


@pytest.mark.parametrize("packing", [True, False])
def test_a_kernel_that_is_wrong_for_the_model_is_not_used(training, chat_data, tiny_model, tmp_path, packing):
    """As SDPA is where scores are capped: here it scales them otherwise."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("test_wrong", lambda *a, **k: sdpa(*a, **{**k, "scaling": 3.0}))
    AttentionMaskInterface.register("test_wrong", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    made = training.Training(tmp_path, tiny_model, chat_data, "full", data__packing=packing)
    made.trainee.causal_lm.set_attn_implementation("test_wrong")
    check_packing(made.trainee)
    assert made.trainee.causal_lm.config._attn_implementation == "eager"
    assert [n.text for n in made.notices] == [
        "Attention is computed by the model's own code: test_wrong is wrong for it."
    ]


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(training, chat_data, tiny_model, tmp_path):
    LlamaConfig(**{**SIZE, "vocab_size": 1000}).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match=r"16384 tokens, the model only 1000") as caught:
        training.Training(tmp_path / "run", tmp_path, chat_data, "pretrain", model__tokenizer=str(tiny_model))
    assert "model.tokenizer" in str(caught.value)


@pytest.mark.parametrize("change", ["one byte", "one weight", "two swapped signs"])
def test_the_hash_of_frozen_weights_sees_every_change(change):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 3).bfloat16()])
    model.requires_grad_(False)
    before = hash_frozen(model)
    assert hash_frozen(model) == before
    with torch.no_grad():
        if change == "one byte":
            model[0].weight.view(torch.uint8)[2, 3] ^= 1
        elif change == "one weight":
            model[2].weight[2, 2] += 1
        else:
            model[1].weight[0, 0], model[0].weight[0, 0] = 3.0, -3.0
    assert hash_frozen(model) != before


def test_the_hash_does_not_look_at_trained_weights():
    model = nn.Linear(4, 4)
    model.bias.requires_grad_(False)
    before = hash_frozen(model)
    with torch.no_grad():
        model.weight.zero_()
    assert hash_frozen(model) == before


def test_neftune_adds_noise_of_each_examples_own_size_in_training_only(training, chat_data, tiny_model, tmp_path):
    made = training.Training(tmp_path, tiny_model, chat_data, "lora", train__neftune_alpha=7.0, micro_batch_tokens=512)
    model = made.trainee.causal_lm
    [batch] = micro_batches(made.data.train, [0, 3, 6], micro_batch_tokens=512)
    seen = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda *arguments: seen.append(arguments[2].detach()))  # after the noise
    for train, seed in ((False, 1), (True, 1), (True, 1), (True, 2)):
        model.train(train)
        torch.manual_seed(seed)
        with torch.no_grad():
            made.trainee.loss_sum(batch)
    quiet, one, again, other = seen
    assert torch.equal(quiet[0], embedding.weight[batch.input_ids[0]])
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    bounds = batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        noise = (one - quiet)[0, begin:end]
        size = 7.0 / ((end - begin) * noise.shape[-1]) ** 0.5
        assert 0.98 * size < float(noise.abs().max()) <= size * 1.00001


def test_the_passes_are_named_and_in_order(training, chat_data, tiny_model, tmp_path):
    said = []
    recipe = training.make_recipe(tiny_model, chat_data, "lora")
    made = training.Training(tmp_path, tiny_model, chat_data, "lora", recipe=recipe)
    building.build(made.plan, made.tokenizer, made.hear, said.append)
    assert said[0] == "Loading the model"
    assert said[-1] == "Making the optimizer"
    assert len(said) == len(building.PASSES)


def test_a_run_on_one_gpu_goes_to_the_roomiest(monkeypatch):
    chosen = [0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: chosen.append(index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    wish = Recipe.model_validate({"model": "m", "data": {"train": "d"}})
    machine = parse_gpus("RTX A4000, RTX A6000").to_dict()
    alone = Candidate(Layout("single", "lora", "none", "bf16", "keep", 512, "cuda"), {}, 0, True)
    assert training_device(Plan(wish, alone, hardware=machine)).index == 1
    pair = Candidate(Layout("ddp", "lora", "none", "bf16", "keep", 512, "cuda", 2), {}, 0, True)
    chosen[:] = [0]
    assert training_device(Plan(wish, pair, hardware=machine)).index == 0
