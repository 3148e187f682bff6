"""Load the tokenizer of a recipe: the bundled one, a folder's or a Hub repository's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kitaeru.errors import ModelError
from kitaeru.i18n import tr
from kitaeru.model.bundled import NAME, bundled_folder
from kitaeru.recipe.types import ModelSection

# Tokens that model families keep for padding; they are looked up, never added: the vocabulary stays as it is.
_PADDING = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|Bearer\s+\S+|(?<=://)[^/\s@]+@")


def load_tokenizer(section: ModelSection) -> Any:
    """The fast tokenizer of `section`, with its chat template and a pad token.

    Raises:
        ModelError: it is not there, cannot be reached or read, or gives no character offsets.
    """
    from transformers import AutoTokenizer

    name = section.tokenizer or section.name
    revision = section.revision if section.tokenizer is None else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _place(name), revision=revision or "main", trust_remote_code=section.trust_remote_code, use_fast=True
        )
    except ModelError:
        raise
    except Exception as error:  # the Hub client, transformers and tokenizers each have their own kinds
        raise _not_loaded(name, error) from None
    if not tokenizer.is_fast:
        raise ModelError(
            tr(
                "The tokenizer of {name} gives no character positions, so answers cannot be told from questions.",
                name=name,
            ),
            remedy=tr("Name a repository that has a tokenizer.json with `model.tokenizer`."),
        )
    if section.chat_template is not None:
        tokenizer.chat_template = _read_template(section.chat_template)
    _choose_padding(tokenizer)
    return tokenizer


def _place(name: str) -> str:
    if name == NAME:
        return str(bundled_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            tr("The folder {name} does not exist.", name=name),
            remedy=tr("Give a folder that is there, a Hub id such as `elyza/Llama-3-ELYZA-JP-8B`, or `bundled`."),
        )
    return name


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            tr("The chat template {path} cannot be read: {why}", path=path, why=error),
            remedy=tr("Correct `model.chat_template`, or leave it out to use the tokenizer's own."),
        ) from error


def _choose_padding(tokenizer: Any) -> None:
    """Give a tokenizer without a pad token one that it already knows (labels never depend on which)."""
    if tokenizer.pad_token is not None:
        return
    known = tokenizer.get_vocab()
    tokenizer.pad_token = next((token for token in _PADDING if token in known), tokenizer.eos_token)


def _not_loaded(name: str, error: Exception) -> ModelError:
    kinds = {type(e).__name__ for e in _chain(error)}
    detail = _SECRET.sub("***", str(error)).strip()
    what = tr("The tokenizer of {name} cannot be loaded.", name=name)
    if "trust_remote_code" in detail:
        what = tr("The tokenizer of {name} needs Python code that comes with it.", name=name)
        remedy = tr("If you trust its authors: `model.trust_remote_code: true`.")
    elif "GatedRepoError" in kinds:
        what = tr("{name} is open only to people who accepted its terms.", name=name)
        remedy = tr("Accept them on the model's page, then sign in with `hf auth login`.")
    elif "RevisionNotFoundError" in kinds:
        remedy = tr("Its repository has no such revision: correct `model.revision`.")
    elif "RepositoryNotFoundError" in kinds:
        what = tr("The Hub knows no repository {name}, or it is private.", name=name)
        remedy = tr("Check the spelling; for a private one, sign in with `hf auth login`.")
    elif kinds & _UNREACHED:
        what = tr("The tokenizer of {name} is not on this machine and the Hub cannot be reached.", name=name)
        remedy = tr("Connect to the network once, give a local folder, or use `model: bundled`.")
    else:
        first = next((line for line in detail.splitlines() if line.strip()), type(error).__name__)
        remedy = tr(
            "A tokenizer.json must be there ({detail}); another can be named with `model.tokenizer`.", detail=first
        )
    return ModelError(what, remedy=remedy)


_UNREACHED = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ReadTimeout",
    "ProxyError",
}


def _chain(error: BaseException | None) -> list[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen
