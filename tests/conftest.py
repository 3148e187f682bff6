"""What all tests share: no network, English, one thread, caches in a temporary folder; the models they train."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from kitaeru import i18n

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "kitaeru" / "assets"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# Before torch and transformers are imported, and for every process a test starts.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    LC_ALL="C.UTF-8",
    COLUMNS="100",
)
for _name in ("FORCE_COLOR", "HF_TOKEN", "KITAERU_LANG"):
    os.environ.pop(_name, None)

# A slow machine is no failure, and CI tries the same examples each time.
settings.register_profile("kitaeru", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("kitaeru")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device; torch is imported only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KITAERU_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("KITAERU_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(autouse=True)
def _english() -> Iterator[None]:
    i18n.set_language("en")
    yield
    i18n.set_language(None)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own empty folder, which is also the working directory: `runs/` appears here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The folder of the bundled model, weights included."""
    return ASSETS / "bundled"


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    """The folder of the packaged Japanese tokenizer (16,384 pieces, chat template)."""
    return ASSETS / "bundled"


@pytest.fixture(scope="session")
def tiny_model(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (1.1M parameters, fp32, always the same) and the packaged tokenizer.

    Shared by the whole session: read it, never write into it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copy(tokenizer_folder / name, folder)
    return folder


@pytest.fixture(scope="session")
def training() -> ModuleType:
    """The module training.py: small runs of the real engine with an explicit layout."""
    spec = importlib.util.spec_from_file_location("training", Path(__file__).with_name("training.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def chat_data(training: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short conversations."""
    return training.write_data(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def valid_data(training: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 other short conversations."""
    return training.write_data(tmp_path_factory.mktemp("data") / "valid.jsonl", 6, start=100)


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder with more Japanese data than the repository carries: KITAERU_SHARED, or `shared` beside the clone."""
    folder = Path(os.environ.get("KITAERU_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("the optional folder with more data is not there")
    return folder
