from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = "from kitaeru.kernels.triton_or_none import tl, triton; print(triton.__name__, tl.__name__)"


def test_both_names_are_there_where_triton_is(tmp_path: Path) -> None:
    # A linter once took the second import for unused; a machine without Triton does not notice.
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    (tmp_path / "triton" / "language.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.stdout.split() == ["triton", "triton.language"], done.stderr
