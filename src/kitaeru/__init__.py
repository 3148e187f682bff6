"""kitaeru (鍛える): fine-tune large language models, Japanese ones first, on the GPUs you own.

Importing this package does not import torch.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kitaeru")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
