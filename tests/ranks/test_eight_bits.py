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
