"""One small training run, shared by all tests of the object API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kitaeru import JapaneseModel, LoRAConfig, LoRAFinetuningTrainer, TrainingConfig, TrainingResult

ROWS = [{"instruction": f"{i}番は?", "input": "", "output": f"{i}番です。"} for i in range(24)]
NEW = [{"instruction": f"{i}番は?", "output": f"{i}番です。"} for i in range(40, 44)]


@pytest.fixture(scope="session")
def small() -> Callable[..., TrainingConfig]:
    """`small(folder, max_steps=3)`: a config of a run that takes a second."""

    def make(folder: Path, **values: object) -> TrainingConfig:
        recipe = {"limits.device": "cpu", "limits.threads": 1, "samples.count": 0, "track.tensorboard": False}
        wanted: dict[str, object] = {"max_steps": 4, "max_length": 64, "learning_rate": 1e-2, "batch_size": 8}
        return TrainingConfig(output_dir=folder, **{**wanted, **values, "recipe": recipe})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def trained(tiny_model: Path, small: Callable[..., TrainingConfig], tmp_path_factory: pytest.TempPathFactory):
    """The result of training an adapter on the tiny model with evaluation data."""
    folder = tmp_path_factory.mktemp("api") / "run"
    trainer = LoRAFinetuningTrainer(JapaneseModel(tiny_model), LoRAConfig(r=4), small(folder, eval_steps=2))
    result = trainer.train(ROWS, NEW)
    assert isinstance(result, TrainingResult)
    return result
