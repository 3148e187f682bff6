"""A checkpoint knows no strategy: written under one, resumed under another, as if nothing had happened; the result is
the same files."""

from __future__ import annotations

import pytest
import torch

PATHS = {
    "1-2-1": [("single", 1), ("ddp", 2), ("single", 1)],
    "ddp-fsdp-single": [("ddp", 2), ("fsdp", 2), ("single", 1)],
    "single-fsdp-ddp4": [("single", 1), ("fsdp", 2), ("ddp", 4)],
    "fsdp3-ddp-fsdp": [("fsdp", 3), ("ddp", 2), ("fsdp", 2)],
}
PIPE, SPLIT = {"cuts": (3, 2), "variant": "1f1b"}, {"cuts": (1, 4), "devices": 2}
FINE = {"cuts": (1, 2, 1, 1), "variant": "interleaved"}
# Of an untied model, since a pipeline would train a tied table twice.
STAGED = {
    "single-pipeline-ddp": [("single", 1, {}), ("pipeline", 2, PIPE), ("ddp", 2, {})],
    "pipeline-fsdp-pipeline": [("pipeline", 2, PIPE), ("fsdp", 2, {}), ("pipeline", 2, FINE)],
    "ddp-model_parallel-pipeline": [("ddp", 2, {}), ("model_parallel", 1, SPLIT), ("pipeline", 2, PIPE)],
}


@pytest.fixture(scope="session")
def whole(crew, family, chat_data, tmp_path_factory):
    """The same run in one go on one process."""
    done = {}

    def get(method, name="llama", layers=2, **more):
        key = (method, name, layers, *more)
        if key not in done:
            folder = tmp_path_factory.mktemp("whole")
            model = family(name, layers)
            options = {"folder": folder / "run", "model": model, "data": chat_data, "method": method, **more}
            [done[key]] = crew.run(folder, 1, crew.train, write=True, **options, **crew.RUN)
        return done[key]

    return get


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("path", PATHS)
def test_one_run_under_three_strategies(crew, family, chat_data, whole, tmp_path, method, path):
    wanted = whole(method)
    parts = [(strategy, ranks, {}) for strategy, ranks in PATHS[path]]
    crew.moved(parts, wanted, tmp_path, model=family("llama"), data=chat_data, method=method)


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("single-pipeline-ddp", "lora"),
        ("pipeline-fsdp-pipeline", "full"),
        ("ddp-model_parallel-pipeline", "full"),
    ],
)
def test_one_run_with_and_without_stages(crew, family, chat_data, whole, tmp_path, method, path):
    wanted = whole(method, "qwen3", 5)
    crew.moved(STAGED[path], wanted, tmp_path, model=family("qwen3", 5), data=chat_data, method=method)


def test_a_head_that_is_trained_beside_the_adapter(crew, family, chat_data, whole, tmp_path):
    """PEFT's `modules_to_save`, on the last stage alone; and 8-bit moments, whose counters are no tensors."""
    more = {"lora__modules_to_save": ("lm_head",), "train__optimizer": "lion"}
    wanted = whole("lora", "qwen3", 5, **more)
    parts = [("pipeline", 2, PIPE), ("single", 1, {}), ("pipeline", 2, FINE)]
    crew.moved(parts, wanted, tmp_path, model=family("qwen3", 5), data=chat_data, method="lora", **more)


def test_an_adapter_trained_by_several_loads_in_peft(crew, family, chat_data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answers = crew.run(
        tmp_path / "place",
        2,
        crew.train,
        folder=tmp_path / "run",
        model=family("qwen3"),
        data=chat_data,
        method="lora",
        strategy="fsdp",
        write=True,
        stop_at=3,
        **crew.RUN,
    )
    base = AutoModelForCausalLM.from_pretrained(family("qwen3"), dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, answers[0]["result"]).named_parameters())
    assert all(torch.equal(loaded[name], weight) for name, weight in answers[0]["weights"].items())


def test_qlora_on_two_ranks_is_qlora_on_one(crew, tiny_model, chat_data, tmp_path):
    """A 4-bit base is the same on both; its packed bytes do not change."""
    options = {"model": tiny_model, "data": chat_data, "method": "qlora", "stop_at": 6, **crew.RUN}
    [wanted] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    for answer in crew.run(tmp_path / "2", 2, crew.train, folder=tmp_path / "two", strategy="ddp", **options):
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
        assert answer["frozen"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp_that_keeps_layers_whole_sees_a_restored_checkpoint(crew, family, chat_data, valid_data, tmp_path, method):
    """The variant `grad`, with an evaluation before earlier weights come back; recomputation on top."""
    options = {
        **crew.RUN,
        "model": family("llama"),
        "data": chat_data,
        "method": method,
        "activations": "recompute",
        "data__valid": str(valid_data),
        "train__keep_best": True,
        "train__eval_every": 3,
        "step": 3,
    }
    [wanted] = crew.run(tmp_path / "1", 1, crew.best, folder=tmp_path / "one", **options)
    answers = crew.run(
        tmp_path / "2", 2, crew.best, folder=tmp_path / "two", strategy="fsdp", variant="grad", **options
    )
    assert wanted["again"] == wanted["then"]
    for answer in answers:
        assert answer["again"] == answer["then"]
        assert answer["again"] == pytest.approx(wanted["again"], rel=1e-5)


@pytest.mark.parametrize(
    ("base", "strategy", "ranks", "how"),
    [("nf4", "pipeline", 2, PIPE), ("int8", "pipeline", 2, FINE), ("nf4", "model_parallel", 1, SPLIT)],
)
def test_stages_of_a_quantised_base(crew, family, chat_data, tmp_path, base, strategy, ranks, how):
    """Each process quantises its own layers; answers are those of one device, with caches and without."""
    method = "qlora" if base == "nf4" else "lora"
    options = {"model": family("gemma", 5), "data": chat_data, "method": method, "base": base, "stop_at": 5}
    options |= {**crew.RUN, "activations": "recompute"}
    [wanted] = crew.run(tmp_path / "1", 1, crew.answering, folder=tmp_path / "one", **options)
    answers = crew.run(
        tmp_path / "2", ranks, crew.answering, folder=tmp_path / "two", strategy=strategy, **options, **how
    )
    for answer in answers:
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert answer["frozen"]
        assert answer["texts"] == wanted["texts"]
    assert len(wanted["texts"][0]) > 8
    if strategy == "pipeline":  # nobody holds the others' bytes
        assert max(answer["bytes"] for answer in answers) < 0.75 * wanted["bytes"]


@pytest.mark.parametrize(("name", "activations"), [("", "keep"), ("", "recompute"), ("wide gemma3", "keep")])
def test_fused_layers_in_stages(crew, family, tiny_model, chat_data, tmp_path, name, activations):
    model = family(name) if name else tiny_model
    options = {"model": model, "data": chat_data, "method": "qlora", "stop_at": 5, **crew.RUN}
    options |= {"arithmetic": "16bit", "activations": activations}
    [wanted] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    how = {"strategy": "pipeline", "variant": "1f1b", "cuts": (1, 1)}
    answers = crew.run(tmp_path / "2", 2, crew.train, folder=tmp_path / "two", **how, **options)
    for answer in (wanted, *answers):
        assert answer["fused"], answer["notices"]
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


def test_a_rank_may_have_nothing_to_do(crew, family, chat_data, tmp_path):
    """Four ranks, two micro-batches: no rank hangs, and the losses are the single process's."""
    options = {"model": family("llama"), "data": chat_data, "method": "full", "stop_at": 3, **crew.RUN}
    options |= {"train__global_batch_tokens": 120}
    [wanted] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    for strategy in ("ddp", "fsdp"):
        answers = crew.run(tmp_path / strategy, 4, crew.train, folder=tmp_path / "run", strategy=strategy, **options)
        assert answers[3]["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


def test_fewer_micro_batches_than_stages(crew, family, chat_data, tmp_path):
    options = {"model": family("qwen3", 5), "data": chat_data, "method": "lora", "stop_at": 3, **crew.RUN}
    options |= {"train__global_batch_tokens": 60}
    [wanted] = crew.run(tmp_path / "1", 1, crew.train, folder=tmp_path / "one", **options)
    how = {"strategy": "pipeline", "variant": "1f1b", "cuts": (1, 1, 2, 1)}
    answers = crew.run(tmp_path / "4", 4, crew.train, folder=tmp_path / "four", **how, **options)
    assert answers[3]["losses"] == pytest.approx(wanted["losses"], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("full", [("fsdp", 4, {"shards": 2}), ("single", 1, {}), ("fsdp", 4, {"variant": "offload", "shards": 2})]),
        ("qlora", [("fsdp", 2, {}), ("single", 1, {}), ("fsdp", 2, {"variant": "grad"})]),
    ],
)
def test_one_run_in_pieces_and_whole(crew, family, chat_data, whole, tmp_path, method, parts):
    crew.moved(parts, whole(method), tmp_path, model=family("llama"), data=chat_data, method=method)


@pytest.mark.parametrize(
    "parts", [[("single", 1), ("single", 1), ("single", 1)], [("single", 1), ("fsdp", 2), ("fsdp", 3)]]
)
def test_moments_in_16_bits_go_on(crew, family, chat_data, tmp_path, parts):
    """From RAM on one rank, on two and on three; on as many as before to the last bit."""
    options = {"model": family("qwen3"), "data": chat_data, "method": "full", "activations": "recompute"}
    options |= {"variant": "offload", "train__optimizer": "adamw_16bit"}
    [wanted] = crew.run(tmp_path / "w", 1, crew.train, folder=tmp_path / "whole", write=True, **options, **crew.RUN)
    crew.moved([(*part, {}) for part in parts], wanted, tmp_path / "m", **options)
    if parts[-1] == ("single", 1):
        result = tmp_path / "m" / "run" / "model"
        assert all(torch.equal(w, crew.written(wanted["result"])[n]) for n, w in crew.written(result).items())


def test_moments_in_16_bits_go_on_in_32_and_back(crew, family, chat_data, whole, tmp_path):
    """Onto more GPUs, whose memory holds 32 bits, and back; what is left of rounding is no other training."""
    wanted = whole("full")
    ram = {"variant": "offload", "activations": "recompute", "train__optimizer": "adamw_16bit"}
    options = {"model": family("llama"), "data": chat_data, "method": "full", "folder": tmp_path / "run"}
    losses = []
    for part, (strategy, ranks, how) in enumerate([("fsdp", 2, ram), ("ddp", 2, {}), ("single", 1, ram)]):
        more = {"strategy": strategy, "resume": part > 0, "stop_at": 3 * (part + 1)}
        answers = crew.run(tmp_path / str(part), ranks, crew.train, **more, **options, **how, **crew.RUN)
        losses += answers[0]["losses"]
    assert losses == pytest.approx(wanted["losses"], rel=2e-3)


@pytest.mark.parametrize("then", ["done", "killed", "full"])
def test_pieces_are_written_while_training_goes_on(crew, family, chat_data, whole, tmp_path, then):
    """Each rank its own, nothing put together; a kill or a full disk meanwhile leaves the checkpoint before it good."""
    wanted = whole("full")
    options = {"folder": tmp_path / "run", "model": family("llama"), "data": chat_data, "method": "full", **crew.RUN}
    arguments = (tmp_path / "2", 2, crew.writes_behind)
    if then == "done":
        answers = crew.run(*arguments, then=then, strategy="fsdp", **options)
        assert answers[0]["saved"] == [3, 6, 9]
        for answer in answers:
            assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
            assert answer["seen"] == [["step-00000003"]]  # while step 7 and 8 were made
        sizes = dict(answers[0]["files"]["step-00000006"])
        assert sizes.keys() == {"manifest.json", "state.json", "state.safetensors", "state-0001.safetensors"}
        assert sizes["state-0001.safetensors"] == pytest.approx(sizes["state.safetensors"], rel=0.1)
        return
    with pytest.raises(AssertionError, match={"killed": "exit code -9", "full": "CheckpointError.*No space"}[then]):
        crew.run(*arguments, then=then, strategy="fsdp", **options)
    [again] = crew.run(tmp_path / "1", 1, crew.train, resume=True, **options)
    assert again["steps"] == list(range(4, 10))
    assert again["losses"] == pytest.approx(wanted["losses"][3:], rel=1e-5)
