"""The comparison of gradients before training sees the same under every strategy that has fused layers."""

import re

import pytest

# The second rank of the second has no micro-batch; the third has half of the layers on each.
WAYS = {"single": (1, {}), "ddp": (2, {}), "pipeline": (2, {"variant": "1f1b", "cuts": (4, 4)})}


def test_all_ranks_find_the_same_wrong_gradient(crew, bundled, chat_data, tmp_path):
    numbers = {}
    for strategy, (ranks, how) in WAYS.items():
        answers = crew.run(
            tmp_path / strategy,
            ranks,
            crew.settled,
            folder=tmp_path / strategy / "run",
            model=bundled,
            data=chat_data,
            strategy=strategy,
            micro_batch_tokens=512,
            **how,
        )
        assert sum(len(answer["kinds"]) for answer in answers) == 8 * (ranks if strategy == "ddp" else 1)
        for answer in answers:
            assert answer["left"] == []
            assert answer["said"] == answers[0]["said"]
            for kind in answer["kinds"]:
                assert kind == {"qkv": "16bit", "down": "16bit", "out": "int8", "both": "int8"}
        numbers[strategy] = [float(n) for n in re.findall(r"-?\d+\.\d+", answers[0]["said"])]
    assert len(numbers["single"]) == 9
    # The last three are those of the run; of the wrong gradient only chance decides the digits.
    for strategy in ("ddp", "pipeline"):
        assert numbers[strategy][-3:] == pytest.approx(numbers["single"][-3:], abs=0.011)


FULL_WAYS = {
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp": (2, {"strategy": "fsdp", "activations": "recompute"}),
    "pipeline": (2, {"strategy": "pipeline", "variant": "1f1b", "cuts": (1, 1)}),
    "model_parallel": (1, {"strategy": "model_parallel", "devices": 2, "cuts": (1, 1)}),
    "in RAM": (1, {"variant": "offload", "activations": "recompute"}),
    "in RAM, on two": (2, {"strategy": "fsdp", "variant": "offload", "activations": "recompute"}),
}


@pytest.mark.parametrize("way", FULL_WAYS)
def test_full_training_in_8_bits_is_the_same_under_every_strategy(crew, hard, alone, tmp_path, way):
    """Weights that lie whole, are gathered, come from RAM: the same numbers, but for sums in another order that push a
    number to the other side of a step of 8 bits.
    """
    ranks, how = FULL_WAYS[way]
    name = "qwen3" if "cuts" in how else "llama"  # which has one table for input and output
    options = {"arithmetic": "fp8", **how, **hard(name, "full")}
    answers = crew.run(tmp_path, ranks, crew.train, folder=tmp_path / "run", **options)
    wanted, plain = alone(name, "full", arithmetic="fp8"), alone(name, "full")
    assert wanted["losses"] != pytest.approx(plain["losses"], rel=1e-5)
    for answer in answers:
        assert answer["outcome"] == "finished"
        assert answer["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        ours = answer["weights"]
        own, others = ({name: w for name, w in run["weights"].items() if name in ours} for run in (wanted, plain))
        assert crew.far(ours, own) <= 0.1 * crew.far(others, own)
