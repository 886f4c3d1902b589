"""Check the documentation against the code: links, commands, keys, packages and the generated pages."""

from __future__ import annotations

import importlib.util
import ipaddress
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer

from preceptor.cli.app import app
from preceptor.errors import UserError
from preceptor.recipe import known_keys, recipe_names
from preceptor.tasks import TASKS, load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
KEYS = {key for recipe in TASKS.values() for key in known_keys(recipe)}
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TAKES_RECIPE = ("train", "cache", "doctor")

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
CALL = re.compile(r"(?:^|\s|/)(preceptor\s+[a-z].*)$")
DOTTED = re.compile(r"(?:data|method|teacher|student|model|train|evaluation|report)(?:\.[a-z_0-9]+)+")
FILE_ENDINGS = (
    ".txt",
    ".gz",
    ".py",
    ".md",
    ".html",
    ".json",
    ".jsonl",
    ".yaml",
    ".csv",
    ".safetensors",
    ".npy",
    ".onnx",
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[str]:
    """Return every `preceptor` command line on a page, in a block or inline, without a launcher in front of it."""
    found = []
    for language, block in FENCE.findall(page.read_text("utf-8")):
        if language in ("sh", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.split(r"\s#", line.strip())[0]
                found += [] if line.startswith("#") else CALL.findall(line)
    for code in CODE.findall(prose(page)):
        found += CALL.findall(" ".join(code.split())) if code.startswith("preceptor ") else []
    return found


SHOWN = [pytest.param(line, id=f"{name(page)}: {line[:60]}") for page in PAGES for line in commands(page)]


def split(line: str) -> list[str]:
    line = re.split(r"\s[>|]|;", line)[0].strip()
    if line.count("'") % 2:  # the end of a quoted script
        line = line.rstrip("'")
    return shlex.split(line)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        address = urlsplit(target)
        if address.scheme:
            continue
        file = (page.parent / address.path).resolve() if address.path else page
        assert file.exists(), f"{name(page)}: {target} does not exist"
        assert file.is_relative_to(ROOT), f"{name(page)}: {target} leads out of the repository"
        if address.fragment:
            assert address.fragment in anchors(file), f"{name(page)}: {target} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_address_is_private(page: Path) -> None:
    for address in re.findall(r"https?://[^\s)>\"'`]+", page.read_text("utf-8")):
        host = urlsplit(address).hostname or ""
        assert "." in host, f"{name(page)}: {address}"
        assert not host.endswith((".local", ".internal", ".lan", ".corp")), f"{name(page)}: {address}"
        try:
            public = ipaddress.ip_address(host).is_global or ipaddress.ip_address(host).is_loopback
        except ValueError:
            public = True
        assert public, f"{name(page)}: {address}"


def test_pages_contain_commands() -> None:
    """Without commands, the test below would pass without checking anything."""
    assert len(SHOWN) > 50


@pytest.mark.parametrize("line", SHOWN)
def test_command_lines_parse(line: str) -> None:
    verb = line.split()[1]
    assert verb in VERBS, f"there is no verb {verb!r}"
    arguments = split(line)[2:]
    if not arguments or re.search(r"\s\[|\.\.\.", line):  # a mention, or a synopsis
        return
    context = typer.Context(VERBS[verb])
    values, unknown, _ = VERBS[verb].make_parser(context).parse_args(list(arguments))  # paths need not exist
    assert not unknown or verb == "recipes"  # which has verbs of its own
    overrides = [text for text in arguments if re.match(r"[a-z_.]+=", text)] if verb != "predict" else []
    for override in overrides:
        key = re.sub("^against[.]", "data.", override.partition("=")[0])
        assert key in KEYS, f"unknown key {key!r}"
    recipe = values.get("recipe", values.get("data"))
    own_class = any(re.search(r"\w:[A-Z]", text) for text in overrides)  # a file of the user's
    if verb in TAKES_RECIPE and recipe in recipe_names() and not own_class:
        load_recipe(recipe, overrides)


@pytest.mark.parametrize("line", ["preceptor trian mhkd-demo", "preceptor train mhkd-demo data.imagesize=3"])
def test_wrong_command_lines_are_found(line: str) -> None:
    with pytest.raises(AssertionError):
        test_command_lines_parse(line)


def test_wrong_values_are_found() -> None:
    with pytest.raises(UserError):
        test_command_lines_parse("preceptor train mhkd-demo 'stages=[distilled]'")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_dotted_keys_exist(page: Path) -> None:
    for code in CODE.findall(prose(page)):
        key = code.partition("=")[0].strip("'")
        if DOTTED.fullmatch(key) and not key.endswith(FILE_ENDINGS):
            # `model.init` may stand for that of teacher and student alike.
            assert any(known == key or known.endswith(f".{key}") for known in KEYS), (
                f"{name(page)}: unknown key {key!r}"
            )


def test_recipe_reference_is_up_to_date() -> None:
    place = DOCS / "make_recipe_reference.py"
    spec = importlib.util.spec_from_file_location("make_recipe_reference", place)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for task, path in script.PAGES.items():
        page = path.read_text("utf-8")
        assert page == script.make_page(task), "run python docs/make_recipe_reference.py"
        for key, *_ in script.leaves(TASKS[task]):
            twin = key.replace("teacher.", "student.", 1) if key.startswith(script.TWINS) else key
            assert f"| `{twin}` |" in page


def test_command_reference_has_every_verb_and_option() -> None:
    page = (DOCS / "reference" / "command-line.md").read_text("utf-8")
    sections = dict(re.findall(r"^## ([\w-]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) - {"Planned"} == set(VERBS)
    for verb, command in VERBS.items():
        options = [text for parameter in command.params for text in parameter.opts if text.startswith("--")]
        for option in options:
            if option != "--help":
                assert option in sections[verb], f"{verb} {option}"


def test_the_architecture_page_lists_the_packages() -> None:
    page = (DOCS / "explanation" / "architecture.md").read_text("utf-8")
    block = next(block for _, block in FENCE.findall(page) if block.startswith("src/preceptor/"))
    source = ROOT / "src" / "preceptor"
    listed: set[Path] = set()
    for line in block.splitlines()[1:]:
        if not line.startswith(" "):
            assert (ROOT / line.split()[0]).is_dir(), line
        elif match := re.match(r"  (\w+)/", line):
            listed.add(source / match[1])
        for module in re.findall(r"\b\w+\.py\b", line):
            folders = [source / match[1]] if (match := re.match(r"  (\w+)/", line)) else [source]
            assert any((folder / module).is_file() for folder in folders), f"{line}: there is no {module}"
    packages = {path for path in source.iterdir() if (path / "__init__.py").is_file()} | {source / "recipes"}
    assert listed == packages, sorted(path.name for path in listed ^ packages)


def test_the_home_page_and_the_navigation_list_the_same_pages() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = []
    for title, path in re.findall(
        r"^ +- (?:(.+): )?(\S+\.(?:md|ipynb))$", config.partition("\nnav:\n")[2], re.MULTILINE
    ):
        heading = re.match(r"# (.+)", (DOCS / path).read_text("utf-8"))
        listed.append((title or (heading[1] if heading else ""), path))
    home = re.findall(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", (DOCS / "index.md").read_text("utf-8"))
    assert home == [entry for entry in listed if entry[1] not in ("index.md", "changelog.md")]
    pages = {path.relative_to(DOCS).as_posix() for path in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]}
    assert {path for _, path in listed} == pages


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_another_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        text = page.read_text("utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(https?:|//)", text)
        loaded += re.findall(r"<link[^>]*\srel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?(https?:|//)", text)
        assert not loaded, page.name
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:|//)", style.read_text("utf-8")), style.name
