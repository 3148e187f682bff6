"""Keeping the libraries' own chatter off the screen. Their errors still arrive as exceptions."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging

# What each says is known and dealt with here; anything else still shows.
_KNOWN = (
    r".*MatMul8bitLt: inputs will be cast.*",
    r".*`torch_dtype` is deprecated.*",
    r".*get_state_buffer.*",
    r".*Merge lora module to 4-bit.*",
    r".*matmul_4bit: weight was quantized from.*",
    r".*is_gradient_checkpointing.*",
    r".*gradient_checkpointing_(en|dis)able. is deprecated.*",
    r".*tie_word_embeddings.*",
    r".*is_gradient_checkpointing. is deprecated.*",
    r".*Ensure that the model.*is loaded correctly.*",
    r".*_pattern keys did not match any targeted module.*",  # a mixture's are parameters, and do match
)


def quiet_libraries() -> None:
    """No progress bars and no warnings that are dealt with; errors only from their loggers."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("bitsandbytes", "peft", "accelerate", "torch.distributed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in _KNOWN:
        warnings.filterwarnings("ignore", message=pattern)
