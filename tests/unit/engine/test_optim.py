import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kitaeru.engine.optim import build_optimizer, load_optimizer_state, optimizer_state, parameter_groups, set_rate
from kitaeru.errors import CheckpointError, MissingLibraryError, TrainingError
from kitaeru.recipe.types import TrainSection

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "adafactor")
WIDTH = 320  # 320 x 320 weights are large enough for bitsandbytes to page them on a GPU
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 16, bias=False, dtype=dtype)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(16, WIDTH, bias=False, dtype=dtype)})
        self.unused = nn.Linear(WIDTH, 16, dtype=dtype)  # an expert that no token reaches: never a gradient

    def forward(self, x):
        x = self.norm(self.first(x))
        return x + self.lora_B["default"](self.lora_A["default"](x))


def make(optimizer, device="cpu", dtype=torch.float32, seed=0, **fields):
    torch.manual_seed(seed)
    model = Net(dtype).to(device)
    named = list(model.named_parameters())
    section = TrainSection(optimizer=optimizer, weight_decay=0.1, **fields)
    built = build_optimizer(named, section, learning_rate=1e-2, lora_plus_ratio=4.0, device_type=device)
    return model, named, built


def train(model, optimizer, steps):
    parameter = model.first.weight
    for step in steps:
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step)).to(parameter)
        set_rate(optimizer, 1 / (1 + step))
        model(x).float().sin().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(name, device, dtype, tmp_path):
    model, named, optimizer = make(name, device, dtype)
    train(model, optimizer, range(3))
    tensors, scalars = optimizer_state(optimizer, named)
    weights = {key: value.cpu().clone() for key, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "state.safetensors")
    train(model, optimizer, range(3, 6))

    resumed, resumed_named, fresh = make(name, device, dtype, seed=1)
    train(resumed, fresh, range(7, 8))  # state of its own, which must vanish
    resumed.load_state_dict(weights)
    load_optimizer_state(
        fresh, resumed_named, load_file(tmp_path / "state.safetensors"), json.loads(json.dumps(scalars))
    )
    train(resumed, fresh, range(3, 6))
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    again, again_scalars = optimizer_state(fresh, resumed_named)
    final, final_scalars = optimizer_state(optimizer, named)
    assert again_scalars == final_scalars
    assert again.keys() == final.keys()
    assert all(torch.equal(again[key], final[key]) for key in final)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_its_state_it_would_go_on_differently(name):
    # The twin of the test above: proves that the state matters in it.
    model, _, optimizer = make(name)
    train(model, optimizer, range(3))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    train(model, optimizer, range(3, 6))
    other, _, fresh = make(name)
    other.load_state_dict(weights)
    train(other, fresh, range(3, 6))
    assert not torch.equal(model.first.weight, other.first.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_paged_state_is_paged_again_after_loading():
    model, named, optimizer = make("paged_adamw_8bit", "cuda")
    train(model, optimizer, range(1))
    tensors, scalars = optimizer_state(optimizer, named)
    _, fresh_named, fresh = make("paged_adamw_8bit", "cuda")
    load_optimizer_state(fresh, fresh_named, tensors, scalars)
    state = fresh.state[dict(fresh_named)["first.weight"]]
    assert getattr(state["state1"], "is_paged", False)
    assert getattr(state["state2"], "is_paged", False)


def test_a_copy_is_saved_and_not_the_living_state():
    model, named, optimizer = make("adamw")
    train(model, optimizer, range(1))
    tensors, _ = optimizer_state(optimizer, named)
    before = tensors["first.weight/exp_avg"].clone()
    train(model, optimizer, range(1, 2))
    assert torch.equal(before, tensors["first.weight/exp_avg"])


def test_eight_bit_moments_are_saved_as_eight_bits():
    model, named, optimizer = make("adamw_8bit")
    train(model, optimizer, range(1))
    tensors, scalars = optimizer_state(optimizer, named)
    assert tensors["first.weight/state1"].dtype == torch.uint8
    assert tensors["first.weight/absmax1"].shape == (WIDTH * WIDTH // 256,)
    assert tensors["norm.weight/state1"].dtype == torch.float32
    assert scalars["values"]["first.weight"] == {"step": 1}
    assert not any(key.startswith("unused.") for key in tensors)


def test_state_follows_names_and_not_positions():
    model, named, optimizer = make("adamw")
    train(model, optimizer, range(2))
    tensors, scalars = optimizer_state(optimizer, named)
    other, other_named, _ = make("adamw")
    turned = list(reversed(other_named))
    fresh = build_optimizer(
        turned, TrainSection(optimizer="adamw"), learning_rate=1e-2, lora_plus_ratio=None, device_type="cpu"
    )
    load_optimizer_state(fresh, turned, tensors, scalars)
    assert torch.equal(fresh.state[other.first.weight]["exp_avg"], optimizer.state[model.first.weight]["exp_avg"])


def test_state_of_another_optimizer_is_refused():
    model, named, optimizer = make("adamw")
    train(model, optimizer, range(1))
    _, other_named, other = make("lion")
    with pytest.raises(CheckpointError, match=r"state of AdamW, and this run uses Lion"):
        load_optimizer_state(other, other_named, *optimizer_state(optimizer, named))


def test_state_of_other_parameters_is_refused():
    model, named, optimizer = make("adamw")
    train(model, optimizer, range(1))
    tensors, scalars = optimizer_state(optimizer, named)
    for key in ("exp_avg", "exp_avg_sq"):
        tensors[f"first.weight/{key}"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"1 parameters .* first\.weight"):
        load_optimizer_state(optimizer, named, tensors, scalars)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load_optimizer_state(
            optimizer, [(n, p) for n, p in named if n != "norm.weight"], *optimizer_state(optimizer, named)
        )


def test_groups_keep_vectors_from_decay_and_speed_up_lora_b():
    named = list(Net().named_parameters())
    groups = parameter_groups(named, learning_rate=0.1, weight_decay=0.5, lora_plus_ratio=16)
    names = {id(p): n for n, p in named}
    table = {g["name"]: ([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in groups}
    assert table == {
        "decay": (["first.weight", "lora_A.default.weight", "unused.weight"], 0.1, 0.5),
        "no_decay": (["first.bias", "norm.weight", "norm.bias", "unused.bias"], 0.1, 0.0),
        "lora_b": (["lora_B.default.weight"], 1.6, 0.5),
    }
    plain = parameter_groups(named, learning_rate=0.1, weight_decay=0.5, lora_plus_ratio=None)
    assert [g["name"] for g in plain] == ["decay", "no_decay"]


def test_set_rate_keeps_the_ratio_of_lora_plus():
    _, _, optimizer = make("adamw")
    set_rate(optimizer, 0.5)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == {"decay": 5e-3, "no_decay": 5e-3, "lora_b": 2e-2}


def one_parameter(optimizer, value, **fields):
    parameter = nn.Parameter(value.clone())
    section = TrainSection(optimizer=optimizer, **fields)
    built = build_optimizer(
        [("weight", parameter)], section, learning_rate=1e-2, lora_plus_ratio=None, device_type="cpu"
    )
    return parameter, built


def gradients(steps, shape=(64, 128)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for step in range(steps)]


def test_adamw_is_the_textbook_update():
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(9))
    parameter, optimizer = one_parameter("adamw", start, weight_decay=0.1, beta1=0.8, beta2=0.95, epsilon=1e-6)
    value = start.double()
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for step, gradient in enumerate(gradients(5), 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        value *= 1 - 1e-2 * 0.1
        first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g * g
        value -= 1e-2 * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-6)
    torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_lion_is_the_update_of_its_paper():
    # Chen et al. 2023 (arXiv:2302.06675), algorithm 2.
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(9))
    parameter, optimizer = one_parameter("lion", start, weight_decay=0.1, beta1=0.9, beta2=0.99)
    value, moment = start.clone(), torch.zeros_like(start)
    for gradient in gradients(5):
        parameter.grad = gradient.clone()
        optimizer.step()
        value = value * (1 - 1e-2 * 0.1) - 1e-2 * torch.sign(0.9 * moment + 0.1 * gradient)
        moment = 0.99 * moment + 0.01 * gradient
    torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-6)


def test_eight_bit_adamw_stays_near_adamw():
    start = torch.zeros(64, 128)
    exact, exact_optimizer = one_parameter("adamw", start)
    small, small_optimizer = one_parameter("adamw_8bit", start)
    for gradient in gradients(5):
        for parameter, optimizer in ((exact, exact_optimizer), (small, small_optimizer)):
            parameter.grad = gradient.clone()
            optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), small.flatten(), dim=0)
    assert cosine > 0.99
    assert not torch.equal(exact, small)


def test_adafactor_moves_a_zero_matrix_at_the_given_rate():
    # A LoRA B starts at zero: a step scaled by the parameter's own size would leave it there.
    parameter, optimizer = one_parameter("adafactor", torch.zeros(64, 128))
    parameter.grad = gradients(1)[0]
    optimizer.step()
    assert 0.5e-2 < parameter.detach().pow(2).mean().sqrt() < 1.5e-2


def test_no_bitsandbytes_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingLibraryError, match="pip install bitsandbytes"):
        make("adamw_8bit")


def test_a_bitsandbytes_that_cannot_step_is_found_before_training(monkeypatch):
    import bitsandbytes

    def broken(self, closure=None):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", broken)
    with pytest.raises(TrainingError, match=r"adamw_8bit does not work here: no kernel image"):
        make("adamw_8bit")
