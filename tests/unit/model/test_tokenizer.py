"""Loading tokenizers: the bundled one, folders, what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kitaeru.errors import ModelError
from kitaeru.model.bundled import bundled_folder
from kitaeru.model.tokenizer import _not_loaded, load_tokenizer
from kitaeru.recipe.types import ModelSection


def load(**section: Any) -> Any:
    return load_tokenizer(ModelSection.model_validate(section))


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A copy without a pad token."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_bundled(tokenizer_folder: Path) -> None:
    assert tokenizer_folder == bundled_folder()
    tokenizer = load(name="bundled")
    assert tokenizer.is_fast
    assert tokenizer.chat_template
    assert tokenizer.pad_token == "<pad>"


def test_a_missing_pad_token_is_chosen_from_what_is_there(folder: Path) -> None:
    tokenizer = load(name=str(folder))
    assert tokenizer.pad_token == "<pad>"
    assert len(tokenizer) == len(load(name="bundled"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8").replace("<pad>", "<other>").replace("<unk>", "<what>")
        (folder / name).write_text(text, encoding="utf-8")
    assert load(name=str(folder)).pad_token == "</s>"


def test_the_tokenizer_and_the_template_can_come_from_elsewhere(folder: Path) -> None:
    (folder / "chat.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    tokenizer = load(name="org/no-such-model", tokenizer=str(folder), chat_template=str(folder / "chat.jinja"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "鍛"}], tokenize=False)
    assert text == "鍛"


def test_a_missing_template_file_is_named(tokenizer_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.jinja"):
        load(name="bundled", chat_template="nowhere.jinja")


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_said_to_be_missing(name: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(name=name)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(name=str(tmp_path))
    assert caught.value.remedy is not None
    assert "model.tokenizer" in caught.value.remedy


def test_without_a_network_the_error_says_so() -> None:
    with pytest.raises(ModelError, match="Hub cannot be reached"):
        load(name="some-org/no-such-model")


def test_an_error_never_shows_a_secret() -> None:
    secret = "hf_abcdefghijklmnop"
    error = _not_loaded("a/b", OSError(f"401 for https://me:{secret}@host/a Bearer {secret} {secret}"))
    assert secret not in str(error)
    assert "me:" not in str(error)
