"""Wheel and sdist hold everything, and the wheel works outside the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "kitaeru"
# What a stranger's install cannot do without.
NEEDED = (
    "py.typed",
    "locale/ja/LC_MESSAGES/kitaeru.mo",
    "assets/bundled/tokenizer.json",
    "assets/bundled/model.safetensors",
    "assets/quickstart/recipe.yaml",
    "assets/quickstart/train.jsonl",
    "recipe/presets/*.yaml",
    "report/*.css",
)
# What only work on kitaeru needs: the catalogue's source.
LEFT_BEHIND = {".po", ".pot", ".pyc"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist, built as `make build` does but without a network, from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    out = tmp_path_factory.mktemp("dist")
    # As `python -m build` does by itself: the wheel is made from the sdist, so what the sdist lacks the wheel lacks.
    made = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree],
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel in it; the libraries come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("stranger") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel], check=True, timeout=120)
    # A line in a .pth puts the folder on the path but does not read the .pth files in it: the editable kitaeru of the
    # tests' environment stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run_outside(installed: Path, tmp_path: Path, *words: str) -> str:
    """The standard output of `words`, run from an empty folder with nothing of the clone on the path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [installed / "bin" / words[0], *words[1:]],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected_files() -> set[str]:
    """Every file of the package in the tree, whatever pyproject.toml says travels, as a path below `kitaeru/`."""
    files = {path for path in SOURCE.rglob("*") if path.is_file() and path.suffix not in LEFT_BEHIND}
    return {path.relative_to(SOURCE).as_posix() for path in files}


@pytest.mark.parametrize("pattern", NEEDED)
def test_wheel_holds_what_is_needed(wheel: Path, pattern: str) -> None:
    assert any(Path(name).match("kitaeru/" + pattern) for name in zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_file_of_the_tree(wheel: Path) -> None:
    names = {name.removeprefix("kitaeru/") for name in zipfile.ZipFile(wheel).namelist()}
    assert expected_files() <= names


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert len(tops) == 2, tops
    assert "kitaeru" in tops
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" in name or "/test" in name]


def test_sdist_holds_every_file_of_the_tree(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2].removeprefix("src/kitaeru/") for name in archive.getnames()}
    assert expected_files() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_wheel_carries_the_licence(wheel: Path) -> None:
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_program_and_module_run_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    assert run_outside(installed, tmp_path, "python", "-c", "import kitaeru; print(kitaeru.__file__)").startswith(
        str(installed)
    )
    version = run_outside(installed, tmp_path, "kitaeru", "--version")
    assert "0." in version
    assert "train" in run_outside(installed, tmp_path, "python", "-m", "kitaeru", "--help")
    japanese = run_outside(installed, tmp_path, "kitaeru", "--lang", "ja", "--help")
    assert any("ぁ" <= letter <= "ん" for letter in japanese), "the Japanese catalogue did not travel"


def test_quickstart_recipe_is_valid_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    recipe = next(installed.glob("lib/*/site-packages/kitaeru/assets/quickstart/recipe.yaml"))
    shown = run_outside(installed, tmp_path, "kitaeru", "recipe", "show", str(recipe))
    assert "bundled" in shown
