"""The guides: both languages show the same commands, every command exists and the quick ones run, links lead somewhere,
recipes are valid, and the tables are what the planner says.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from kitaeru.cli import main
from kitaeru.cli.verbs import VERBS
from kitaeru.recipe.read import read

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"
LANGUAGES = ("en", "ja")
PAGES = tuple(sorted(page.stem for page in (GUIDE / "en").glob("*.md")))
FENCE = re.compile(r"(?:<!-- not run: (?P<needs>[^>]+) -->\n)?```(?P<language>[\w{}-]+)\n(?P<body>.*?)```\n", re.DOTALL)


class Block(NamedTuple):
    language: str
    body: str
    needs: str


def text(language: str, page: str) -> str:
    return (GUIDE / language / f"{page}.md").read_text(encoding="utf-8")


def blocks(language: str, page: str) -> list[Block]:
    found = [Block(m["language"], m["body"], m["needs"] or "") for m in FENCE.finditer(text(language, page))]
    assert len(re.findall(r"^```", text(language, page), re.MULTILINE)) == 2 * len(found), "a block this test misses"
    return found


def commands(page: str, *, quick: bool = False) -> Iterator[list[str]]:
    """The kitaeru commands of a page as words, here-documents left out; `quick`: those without a reason not to run."""
    for block in blocks("en", page):
        if block.language != "bash" or (quick and block.needs):
            continue
        body = re.sub(r"(<<'EOF'\n).*?\nEOF\n", r"\1", block.body, flags=re.DOTALL)
        for line in body.splitlines():
            words = shlex.split(line.replace(" <<'EOF'", ""))
            if "kitaeru" in words:
                yield words[words.index("kitaeru") + 1 :]


def test_both_languages_have_the_same_pages() -> None:
    assert tuple(sorted(page.stem for page in (GUIDE / "ja").glob("*.md"))) == PAGES
    for language in LANGUAGES:
        listed = re.search(r"```\{toctree\}\n:maxdepth: 1\n\n(.*?)```", text(language, "index"), re.DOTALL)
        assert listed is not None
        assert sorted(listed[1].split()) == sorted(set(PAGES) - {"index"})


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_show_the_same(page: str) -> None:
    def bare(block: Block) -> Block:
        # Comments in recipes, and titles in toctrees, are in the page's language.
        return block._replace(body=re.sub(r" +#.*", "", block.body))

    english, japanese = ([bare(b) for b in blocks(language, page)] for language in LANGUAGES)
    assert english == japanese
    headings = [len(re.findall(r"^#+ ", FENCE.sub("", text(language, page)), re.MULTILINE)) for language in LANGUAGES]
    assert headings[0] == headings[1]


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(language: str, page: str) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text(language, page)):
        name, _, anchor = target.partition("#")
        other = GUIDE / language / (name or f"{page}.md")
        assert other.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_slug(heading) for heading in headings}, target


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        verb = next((verb for verb in VERBS if words and verb.name == words[0]), None)
        if verb is None:
            assert set(words) <= {"--version", "--help", "--lang", "ja"}, words
            continue
        path = words[:2] if verb.inside else words[:1]
        assert not verb.inside or path[1] in {inner.name for inner in verb.inside}, words
        assert main([*path, "--help"]) == 0
        shown = capsys.readouterr().out
        for option in (word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)):
            assert option in ("--help", "--lang", "--debug") or re.search(rf"(^|\s){option}(\W|$)", shown), (
                words,
                option,
            )


def test_every_verb_is_in_a_guide() -> None:
    shown = {words[0] for page in PAGES for words in commands(page) if words}
    # `make quickstart`, and the container's entry point, leave the program's name out.
    assert {verb.name for verb in VERBS} - shown <= {"quickstart"}


def test_quick_commands_run(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("en", "first"):
        for name, body in re.findall(r"cat > (\S+) <<'EOF'\n(.*?)EOF\n", block.body, re.DOTALL):
            Path(name).write_text(body, encoding="utf-8")
    assert Path("my.yaml").is_file()
    ran = 0
    for words in dict.fromkeys(tuple(words) for page in PAGES for words in commands(page, quick=True)):
        assert main(list(words)) == 0, (words, capsys.readouterr().err)
        ran += 1
    assert ran >= 8


@pytest.mark.parametrize("page", PAGES)
def test_recipes_are_valid(page: str, in_tmp: Path) -> None:
    for block in blocks("en", page):
        if block.language == "yaml" and block.body.startswith("model:"):
            Path("r.yaml").write_text(block.body, encoding="utf-8")
            assert read(Path("r.yaml")).recipe.data.train


@pytest.mark.parametrize("page", PAGES)
def test_python_is_the_api(page: str) -> None:
    import kitaeru

    for block in blocks("en", page):
        if block.language == "python":
            compile(block.body, page, "exec")
            for names in re.findall(r"from kitaeru import (.*)", block.body):
                assert {name.strip() for name in names.split(",")} <= set(kitaeru.__all__)


def test_docker_is_as_the_guide_says() -> None:
    root = GUIDE.parents[1]
    compose, dockerfile = ((root / name).read_text(encoding="utf-8") for name in ("compose.yaml", "Dockerfile"))
    for words in ("ipc: host", "memlock: -1", "stack: 67108864", "stop_signal: SIGINT", "stop_grace_period: 2m"):
        assert words in compose
    assert '"doctor", "--quick"' in dockerfile
    services = set(re.findall(r"^  (\w+):$", compose, re.MULTILINE))
    for block in blocks("en", "docker"):
        for service in re.findall(r"^docker compose (?:build|run --rm|up -d) (\w+)", block.body, re.MULTILINE):
            assert service in services
        for target in re.findall(r"--target (\w+)", block.body):
            assert re.search(rf"AS {target}$", dockerfile, re.MULTILINE)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guide_tables", GUIDE / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_the_planner_says(tables: ModuleType) -> None:
    for page in PAGES:
        english = text("en", page)
        if "<!-- table:" in english:
            assert tables.renewed(english, "en") == english, "python docs/guide/tables.py writes them anew"
            made = [re.findall(r"<!-- table: .*?<!-- end -->", text(lang, page), re.DOTALL) for lang in LANGUAGES]
            numbers = [[re.findall(r"\d[\d,.]*", table) for table in found] for found in made]
            assert numbers[0] == numbers[1], "the languages differ"
            assert all(numbers[0])
