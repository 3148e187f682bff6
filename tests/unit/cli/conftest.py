"""What a verb's start takes, on a machine that may be slow or busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

_START = "import sys, time; t = time.process_time();"
_PROGRAM = _START + "from kitaeru.cli import main; rc = main(sys.argv[1:]);"
_LIBRARIES = _START + "import cyclopts, rich.console, pydantic, ruamel.yaml; rc = 0;"
_END = (
    "loaded = sorted({'torch', 'transformers', 'numpy'} & set(sys.modules));"
    "print(rc, time.process_time() - t, loaded, file=sys.stderr)"
)


@pytest.fixture(scope="session")
def times_its_libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str], float], float]:
    """`times_its_libraries(words, limit)`: a verb's processor time in units of what importing the libraries of any such
    program takes, each the best of a few tries until it is below the limit. The verb ends well and imports no torch.
    """
    environment = dict(os.environ)
    if environment.pop("PYTHONDONTWRITEBYTECODE", ""):  # compiled once all the same, as an installed program is
        environment["PYTHONPYCACHEPREFIX"] = str(tmp_path_factory.mktemp("compiled"))

    def seconds(code: str, words: list[str]) -> float:
        command = [sys.executable, "-c", code + _END, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        rc, found, loaded = done.stderr.split(" ", 2)
        assert (rc, loaded.strip()) == ("0", "[]")
        return float(found)

    def times(words: list[str], limit: float) -> float:
        best = usual = float("inf")
        for _ in range(6):
            best, usual = min(best, seconds(_PROGRAM, words)), min(usual, seconds(_LIBRARIES, words))
            if best < limit * usual:
                break
        return best / usual

    return times
