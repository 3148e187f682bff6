from __future__ import annotations

import re
from typing import Any

import pytest

from kitaeru.errors import PlanError
from kitaeru.hardware import Hardware, parse_gpus
from kitaeru.plan.choose import default_seq_len, make_plan
from kitaeru.plan.problem import needed_bytes
from kitaeru.plan.types import DataFacts, Plan
from kitaeru.recipe.types import Recipe
from kitaeru.shape import ModelShape

ELYZA = "elyza/Llama-3-ELYZA-JP-8B"
FACTS = DataFacts(examples=5000, tokens=1_500_000, longest=1800, valid_examples=200)
LAPTOP = parse_gpus("none", "16GB", cores=4)
A5000 = parse_gpus("2x RTX A5000", "128GB")
ONE = parse_gpus("RTX A5000", "128GB")
# The recipe's fields that training needs and a person may leave out.
FILLED = ("method", "strategy", "model.quantize", "data.seq_len", "train.precision", "train.learning_rate",
          "train.warmup_steps", "train.eval_every", "train.save_every", "limits.device", "limits.micro_batch_tokens",
          "limits.checkpointing")  # fmt: skip


def shape_of(name: str) -> ModelShape:
    shape = ModelShape.from_catalogue(name)
    assert shape is not None
    return shape


def wish(name: str = ELYZA, **values: Any) -> Recipe:
    return Recipe.model_validate({"model": name, "data": {"train": "d.jsonl"}, **values})


def plan(name: str = ELYZA, on: Hardware = A5000, facts: DataFacts | None = FACTS, **values: Any) -> Plan:
    return make_plan(wish(name, **values), on, shape_of(name), facts)


def value(recipe: Recipe, path: str) -> Any:
    found: Any = recipe
    for part in path.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("name", "on"), [(ELYZA, A5000), ("HuggingFaceTB/SmolLM2-135M", LAPTOP)])
def test_nothing_is_left_open(name: str, on: Hardware) -> None:
    made = plan(name, on)
    for path in FILLED:
        assert value(made.recipe, path) not in (None, "auto"), path
    assert made.recipe.train.global_batch_tokens
    assert made.recipe.train.epochs
    assert all(decision.why for decision in made.decisions)
    assert len({decision.path for decision in made.decisions}) == len(made.decisions)
    assert all(value(made.recipe, decision.path) == decision.value for decision in made.decisions)
    assert all(rival.why for rival in made.rivals)


def test_a_plan_survives_its_file(tmp_path: Any) -> None:
    made = plan()
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").chosen == made.chosen
    assert Plan.load(tmp_path / "plan.json").recipe == made.recipe
    assert Plan.load(tmp_path / "plan.json").rivals == made.rivals


PINNED: list[dict[str, Any]] = [
    {"method": "qlora"},
    {"train": {"learning_rate": 5e-5, "max_steps": 7, "warmup_steps": 2, "eval_every": 3, "save_every": 5}},
    {"train": {"global_batch_tokens": 40_000, "epochs": 1.5, "precision": "fp16"}},
    {"limits": {"micro_batch_tokens": 2048, "checkpointing": True}},
    {"limits": {"device": "cpu", "threads": 3}},
    {"data": {"train": "d.jsonl", "seq_len": 4096}},
    {"model": {"name": ELYZA, "quantize": "int8"}},
]


@pytest.mark.parametrize("values", PINNED)
def test_what_is_pinned_stays(values: dict[str, Any]) -> None:
    before = wish(**values)
    made = make_plan(before, A5000, shape_of(ELYZA), FACTS)
    decided = {decision.path for decision in made.decisions}
    for section, given in values.items():
        for name in given if isinstance(given, dict) else [""]:
            path = f"{section}.{name}" if name else section
            assert value(made.recipe, path) == value(before, path)
            assert path not in decided


def test_methods_by_room() -> None:
    assert plan(on=parse_gpus("H100")).layout.method == "lora"
    assert plan("tokyotech-llm/Swallow-13b-hf").layout.method == "qlora"
    assert plan("codellama/CodeLlama-34b-hf").layout.method == "qlora"
    assert plan("HuggingFaceTB/SmolLM2-135M", LAPTOP).layout.method == "lora"


def test_activations_are_kept_where_there_is_room() -> None:
    assert plan("Qwen/Qwen3-0.6B").layout.activations == "keep"
    assert plan("codellama/CodeLlama-34b-hf").layout.activations == "keep8"
    plain = {"arithmetic": "plain"}
    assert plan("codellama/CodeLlama-34b-hf", train=plain).layout.policy == "recompute"


def test_no_more_layers_are_computed_again_than_it_takes() -> None:
    def made_with(**limits: Any) -> Plan:
        plain = {"arithmetic": "plain"}
        return plan("stabilityai/japanese-stablelm-base-gamma-7b", ONE, limits=limits, train=plain)

    made, all_of_them = made_with(), made_with(checkpointing=True)
    tokens, count = made.layout.micro_batch_tokens, made.layout.recomputed
    assert (made.recipe.limits.checkpointing, made.recipe.limits.recomputed_layers) == (True, count)
    assert made_with(micro_batch_tokens=tokens, recomputed_layers=count).layout == made.layout
    fewer = made_with(micro_batch_tokens=tokens, recomputed_layers=count - 1)
    assert (fewer.layout.method, made.layout.method) == ("qlora", "lora")  # the 16-bit base has no room for it
    assert made.chosen.speed is not None
    assert all_of_them.chosen.speed is not None
    assert made.chosen.speed.step_seconds < all_of_them.chosen.speed.step_seconds
    why = next(d.why for d in made.decisions if d.path == "limits.recomputed_layers")
    assert f"{count} of 32 layers" in why


def test_a_hundred_thousand_tokens_go_through_24_gb() -> None:
    """What goes into the layers waits in RAM; without that it would not fit by far."""
    wish = {"method": "qlora", "data": {"train": "d", "seq_len": 102400}, "train": {"global_batch_tokens": 102400}}
    made = plan(ELYZA, ONE, facts=DataFacts(10, 1024000, 102400), **wish)
    assert made.layout.name == "single/qlora/int8/offload/102400"
    assert made.chosen.peak_bytes < 20.5e9
    assert 26e9 < made.chosen.host["activations"] < 27e9
    assert made.recipe.limits.offload_activations is True
    with pytest.raises(PlanError, match="offload_activations=true"):
        plan(ELYZA, ONE, facts=DataFacts(10, 1024000, 102400), **wish,
             limits={"offload_activations": False})  # fmt: skip
    with pytest.raises(PlanError, match="of RAM"):
        plan(ELYZA, parse_gpus("RTX A5000", "24GB"), facts=DataFacts(10, 1024000, 102400), **wish)


def test_a_micro_batch_holds_the_longest_example_and_no_more_than_the_batch() -> None:
    for facts in (FACTS, None, DataFacts(40, 9000, 700)):
        made = plan("Qwen/Qwen3-0.6B", facts=facts)
        longest = min(made.recipe.data.seq_len or 0, facts.longest) if facts else made.recipe.data.seq_len or 0
        assert made.recipe.train.global_batch_tokens is not None
        assert longest <= made.layout.micro_batch_tokens <= max(longest + 7, made.recipe.train.global_batch_tokens)


def test_without_packing_a_micro_batch_is_one_example() -> None:
    made = plan(data={"train": "d.jsonl", "packing": False})
    assert made.layout.micro_batch_tokens == 1800


def test_small_data_makes_about_fifty_steps() -> None:
    made = plan("Qwen/Qwen3-0.6B", facts=DataFacts(400, 60_000, 300))
    batch = made.recipe.train.global_batch_tokens
    assert batch is not None
    assert 45 <= 3 * 60_000 / batch <= 60
    assert plan("Qwen/Qwen3-0.6B").recipe.train.global_batch_tokens == 16384


def test_memory_limit_is_respected() -> None:
    plain = {"arithmetic": "plain"}
    free = plan("Qwen/Qwen3-0.6B", train=plain)
    assert free.chosen.peak_bytes > 12e9
    made = plan("Qwen/Qwen3-0.6B", limits={"memory_gb": 12, "checkpointing": False}, train=plain)
    assert made.chosen.peak_bytes < 12e9
    assert made.layout.micro_batch_tokens < free.layout.micro_batch_tokens
    assert plan("Qwen/Qwen3-0.6B", limits={"memory_gb": 5}, train=plain).layout.recomputed > 0


def test_frozen_products_are_in_8_bits_where_layers_are_known_and_the_card_can() -> None:
    def arithmetic(name: str = "Qwen/Qwen3-0.6B", gpus: str = "RTX A5000", **values: Any) -> str:
        return plan(name, parse_gpus(gpus), **values).layout.arithmetic

    assert arithmetic() == "int8"
    assert arithmetic(gpus="H100") == "fp8"
    assert arithmetic(gpus="T4") == "plain"
    assert arithmetic("HuggingFaceTB/SmolLM2-135M", gpus="H100", method="full") == "plain"
    assert arithmetic(lora={"dropout": 0.1}) == "plain"
    assert [arithmetic(f"google/gemma-{name}") for name in ("2-2b", "3-1b-pt")] == ["int8", "int8"]
    assert arithmetic("rinna/japanese-gpt-neox-3.6b") == "plain"
    assert arithmetic(train={"arithmetic": "16bit"}) == "16bit"


def test_fused_layers_are_faster_and_smaller_in_the_plan() -> None:
    fused, plain = (plan(method="qlora", train={"arithmetic": a}) for a in ("auto", "plain"))
    assert fused.chosen.speed is not None
    assert plain.chosen.speed is not None
    assert fused.chosen.speed.tokens_per_second > 1.5 * plain.chosen.speed.tokens_per_second


def test_other_gpus_are_spoken_of() -> None:
    assert any("idle" in sentence for sentence in plan(strategy="single").chosen.why)
    assert not any("idle" in sentence for sentence in plan(on=parse_gpus("RTX A5000")).chosen.why)


@pytest.mark.parametrize(
    ("name", "on", "values"),
    [
        (ELYZA, "RTX A5000", {"method": "full"}),
        ("tokyotech-llm/Swallow-13b-hf", "RTX A5000", {"method": "lora"}),
        ("codellama/CodeLlama-34b-hf", "RTX A5000", {"data": {"train": "d.jsonl", "seq_len": 16384}}),
        (
            ELYZA,
            "RTX A5000",
            {"limits": {"checkpointing": False}, "method": "lora", "train": {"arithmetic": "plain"}},
        ),
        (ELYZA, "L4", {"method": "qlora", "limits": {"micro_batch_tokens": 262144}}),
        (ELYZA, "L4", {"method": "qlora", "limits": {"micro_batch_tokens": 65536, "offload_activations": False}}),
    ],
)
def test_the_remedy_fits_when_typed(name: str, on: str, values: dict[str, Any]) -> None:
    facts = DataFacts(5000, 9_000_000, 16_000)
    machine = parse_gpus(on)
    with pytest.raises(PlanError) as caught:
        plan(name, machine, facts, **values)
    assert re.search(r"needs [0-9.]+ GB", caught.value.what)
    assert caught.value.remedy
    changes: dict[str, Any] = {key: dict(given) if isinstance(given, dict) else given for key, given in values.items()}
    for path, text in re.findall(r"--set ([a-z_.]+)=(\S+)", caught.value.remedy):
        section, _, key = path.rpartition(".")
        typed: Any = int(text) if text.isdigit() else {"true": True, "false": False}.get(text, text)
        if section:
            changes.setdefault(section, {"train": "d.jsonl"} if section == "data" else {})[key] = typed
        else:
            changes[key] = typed
    assert changes != values
    assert plan(name, machine, facts, **changes).chosen.fits


def test_a_model_nobody_trains_says_what_is_missing_in_one_breath() -> None:
    with pytest.raises(PlanError) as caught:
        plan("meta-llama/Llama-3.1-405B")
    assert "times what is free" in str(caught.value)
    assert "CodeLlama-34b" in str(caught.value)


def test_refusals() -> None:
    with pytest.raises(PlanError, match="no GPU"):
        plan(on=LAPTOP, limits={"device": "cuda"})
    with pytest.raises(PlanError, match="longest"):
        plan(limits={"micro_batch_tokens": 512}, data={"train": "d.jsonl", "seq_len": 2048})


def test_default_seq_len() -> None:
    shape = shape_of(ELYZA)
    assert default_seq_len(wish(), shape) == 2048
    assert default_seq_len(wish(data={"train": "d", "seq_len": 100}), shape) == 100
    assert default_seq_len(wish(limits={"micro_batch_tokens": 512}), shape) == 512
    short = ModelShape("llama", 64, 128, 2, 4, 2, 16, 1000, max_position=256)
    assert default_seq_len(wish(), short) == 256


@pytest.mark.parametrize("gpus", ["RTX A4000, RTX A6000", "RTX A6000, RTX A4000"])
def test_one_device_is_the_roomiest(gpus: str) -> None:
    on = parse_gpus(gpus, "64GB")
    made = plan(on=on, strategy="single", method="lora")
    assert made.layout.devices == 1
    assert "RTX A6000 has 51.5 GB free" in " ".join(made.chosen.why)
    assert made.chosen.peak_bytes > parse_gpus("RTX A4000").devices[0].free_bytes
    other = plan(on=parse_gpus("RTX A6000", "64GB"), strategy="single", method="lora")
    assert made.chosen.speed == other.chosen.speed
    assert made.layout == other.layout


def test_a_mixture_says_what_is_not_packed() -> None:
    gpus = parse_gpus("8x H100", "1TB")
    made = plan("openai/gpt-oss-20b", gpus, method="qlora")  # its experts have biases, gate and up interleaved
    assert "38.2 GB of them stay in 16 bits" in " ".join(made.chosen.why)
    for model in ("mistralai/Mixtral-8x7B-v0.1", ELYZA):
        assert "stay in 16 bits" not in " ".join(plan(model, gpus, method="qlora").chosen.why)


def test_fsdp_is_pinned_by_variant_and_split() -> None:
    four = parse_gpus("4x RTX 3090", "256GB")
    pinned = {"strategy": "fsdp", "method": "qlora"}
    assert plan(on=four, **pinned, limits={"split_over": 2}).layout.way == "fsdp-2x2"
    made = plan(on=four, **pinned, limits={"variant": "offload"})
    assert made.layout.way == "fsdp-offload"
    assert any("lies in RAM" in sentence for sentence in made.chosen.why)
    both = {"split_over": 2, "variant": "offload"}
    assert plan(on=four, **pinned, limits=both).layout.way == "fsdp-offload-2x2"
    assert plan(on=four, strategy="fsdp", method="full", limits=both).layout.way == "fsdp-offload-2x2"
    with pytest.raises(PlanError, match="groups of 3"):
        plan(on=four, **pinned, limits={"split_over": 3})
    with pytest.raises(PlanError, match="gpipe"):
        plan(on=four, **pinned, limits={"variant": "gpipe"})


H100 = parse_gpus("H100", "256GB")
SMALL = "Qwen/Qwen3-0.6B"


def test_graphs_are_taken_where_the_host_holds_the_device_up() -> None:
    made = plan(SMALL, H100, method="qlora")
    assert made.layout.graphs
    assert made.recipe.train.cuda_graphs is True
    assert made.chosen.step_bytes == made.chosen.peak_bytes - made.chosen.memory["graphs"]
    assert "--set train.cuda_graphs=false" in " ".join(made.chosen.why)
    without = plan(SMALL, H100, method="qlora", train={"cuda_graphs": False})
    assert not without.layout.graphs
    assert without.layout.name == made.layout.name
    assert without.chosen.step_bytes == without.chosen.peak_bytes < made.chosen.peak_bytes
    assert made.chosen.speed is not None
    assert without.chosen.speed is not None
    assert made.chosen.speed.step_seconds * 1.03 < without.chosen.speed.step_seconds
    assert "cuda_graphs" not in " ".join(without.chosen.why)


def test_graphs_are_left_where_they_would_gain_little_or_do_not_fit() -> None:
    large = plan(ELYZA, ONE, method="qlora")
    assert not large.layout.graphs
    assert large.recipe.train.cuda_graphs is False
    (told,) = (d.why for d in large.decisions if d.path == "train.cuda_graphs")
    assert "stays taken" in told or "hardly wait" in told
    limits = {"micro_batch_tokens": 4096, "checkpointing": False}
    roomy = plan(SMALL, H100, method="qlora", limits=limits)
    assert roomy.layout.graphs
    limits["memory_gb"] = needed_bytes(roomy.layout, roomy.chosen.peak_bytes) / 1e9 - 0.01
    short = plan(SMALL, H100, method="qlora", limits=limits)
    assert not short.layout.graphs
    (told,) = (d.why for d in short.decisions if d.path == "train.cuda_graphs")
    assert "stays taken" in told


LEAN = {"optimizer": "adamw_8bit", "max_grad_norm": 0.0}


def why_lean(made: Plan) -> str:
    (told,) = (d.why for d in made.decisions if d.path == "train.step_in_backward")
    return told


def test_weights_change_in_the_backward_pass_where_all_gradients_do_not_fit() -> None:
    made = plan(ELYZA, H100, method="full", train=LEAN)
    assert made.layout.step_in_backward
    assert made.recipe.train.step_in_backward is True
    assert made.layout.micro_batch_tokens == made.recipe.train.global_batch_tokens
    assert "32.1 GB" in why_lean(made)
    assert "--set train.step_in_backward=false" in " ".join(made.chosen.why)
    assert make_plan(made.recipe, H100, shape_of(ELYZA), FACTS).layout == made.layout
    with pytest.raises(PlanError):
        plan(ELYZA, H100, method="full", train=LEAN | {"step_in_backward": False})
    with pytest.raises(PlanError) as refused:
        plan(ELYZA, H100, method="full", train=LEAN | {"max_grad_norm": 1.0})
    assert refused.value.remedy is not None
    assert refused.value.remedy.endswith(" GB: --set train.max_grad_norm=0.0")


@pytest.mark.parametrize(("gb", "taken"), [(40, True), (50, False)])
def test_gradients_that_fit_are_kept_unless_it_is_clearly_slower(gb: int, taken: bool) -> None:
    """In 50 GB it would be the same layers, or one or two fewer that are computed again."""
    train = LEAN | {"global_batch_tokens": 4096}
    made = plan("Qwen/Qwen3-4B", H100, method="full", limits={"memory_gb": gb}, train=train)
    assert made.layout.step_in_backward == taken
    assert made.layout.micro_batch_tokens == 4096
    assert 20 < made.layout.recomputed < 32


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": LEAN}, "All gradients, 6.9 GB, fit"),
        ({"train": {"optimizer": "adamw_8bit"}}, "norm of 1.0.* up to 6.9 GB of gradients could be saved"),
        ({"train": LEAN | {"global_batch_tokens": 65536}}, "several micro-batches"),
        ({"train": LEAN | {"on_nan": "skip"}}, "could not be skipped"),
    ],
)
def test_weights_change_after_the_backward_pass_otherwise(values: dict[str, Any], words: str) -> None:
    made = plan("Qwen/Qwen3-1.7B", H100, method="full", **values)
    assert not made.layout.step_in_backward
    assert made.recipe.train.step_in_backward is False
    assert re.search(words, why_lean(made))
    assert "step_in_backward" not in " ".join(made.chosen.why)


def test_who_insists_gets_one_micro_batch_a_step_or_the_reason() -> None:
    train = LEAN | {"step_in_backward": True}
    made = plan("Qwen/Qwen3-1.7B", H100, method="full", train=train | {"global_batch_tokens": 65536})
    assert made.layout.step_in_backward
    assert made.layout.micro_batch_tokens == 65536
    adapter = plan(SMALL, H100, method="qlora", train=train)
    assert adapter.layout.step_in_backward
    assert not adapter.layout.graphs
    for values, words in (
        ({"strategy": "ddp"}, "only on one device"),
        ({"limits": {"variant": "offload"}}, "only on one device"),
        ({"limits": {"micro_batch_tokens": 4096}}, "several micro-batches"),
    ):
        with pytest.raises(PlanError, match=words) as refused:
            plan("Qwen/Qwen3-1.7B", A5000, method="full", train=train | {"optimizer": "adamw"}, **values)
        assert "Leave `train.step_in_backward` out" in str(refused.value.remedy)


def test_a_planned_choice_of_graphs_is_made_again() -> None:
    for made in (plan(SMALL, H100, method="qlora"), plan(ELYZA, ONE, method="qlora")):
        again = make_plan(made.recipe, H100 if made.layout.graphs else ONE, shape_of(made.recipe.model.name), FACTS)
        assert again.layout == made.layout


@pytest.mark.parametrize(
    ("on", "values", "words"),
    [
        (LAPTOP, {}, "need a GPU"),
        (H100, {"method": "full"}, "model's own code"),
        (H100, {"train": {"cuda_graphs": True, "neftune_alpha": 5}}, "NEFTune"),
        (H100, {"data": {"train": "d.jsonl", "packing": False}}, "data.packing"),
        (A5000, {"strategy": "fsdp"}, "model's own code"),
        (A5000, {"strategy": "pipeline"}, "waits for others"),
    ],
)
def test_graphs_that_cannot_be_are_refused_with_the_reason(on: Hardware, values: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words) as refused:
        plan(SMALL, on, **{"train": {"cuda_graphs": True}, **values})
    assert "Leave `train.cuda_graphs` out" in str(refused.value.remedy)


def test_graphs_that_do_not_fit_are_what_is_given_up_first() -> None:
    limits = {"micro_batch_tokens": 4096, "checkpointing": False}
    needed = plan(SMALL, H100, method="qlora", limits=limits, train={"arithmetic": "16bit", "cuda_graphs": True}).chosen
    limits["memory_gb"] = needed_bytes(needed.layout, needed.peak_bytes) / 1e9 - 0.01
    with pytest.raises(PlanError) as refused:
        plan(SMALL, H100, method="qlora", limits=limits, train={"arithmetic": "16bit", "cuda_graphs": True})
    assert "--set train.cuda_graphs=false" in str(refused.value.remedy)


@pytest.mark.parametrize(
    ("on", "method", "arithmetic", "words"),
    [(A5000, "qlora", "fp8", "cannot compute so"), (H100, "full", "16bit", "Fused layers have frozen weights")],
)
def test_an_arithmetic_that_cannot_be_is_what_to_leave_out(
    on: Hardware, method: str, arithmetic: str, words: str
) -> None:
    with pytest.raises(PlanError, match=words) as refused:
        plan(SMALL, on, method=method, train={"arithmetic": arithmetic})
    assert refused.value.remedy == "Leave `train.arithmetic` out."
