"""The teaching pages are true: python blocks run, commands name what exists, refusals are quoted word by word, links lead somewhere.

A fence's words after the language say what the test does with the block; all python blocks of a page share one namespace.

    ```python                 runs
    ```python raises          raises a PtlabError; the next ```text block is its message, word by word
    ```python no-run: why     is only compiled
    ```bash                   every command is looked up: configs load with these overrides, scripts, targets and options exist
    ```bash fails             one training command whose config is refused; the next ```text block is what it prints
    ```bash warns             one that runs with a warning; the next ```text block is the warning
"""

from __future__ import annotations

import argparse
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ptlab import cli, local
from ptlab.config import EnginesConfig, TorchSamplerConfig, load_config
from ptlab.errors import ConfigError, PtlabError
from ptlab.local import _default_connection, _disconnect

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEACHING = [DOCS / f"{name}.md" for name in ("README", "rl-explained", "visual-summary", "recipes-explained", "quick-reference")]
PAGES = [*TEACHING, DOCS / "evaluation.md", *sorted(DOCS.glob("recipes/*.md")), *sorted(DOCS.glob("tutorials/*.md"))]
NOT_OURS = frozenset({"cd", "cat", "curl", "export", "head", "ls", "mkdir", "pip", "tail", "unshare", "apt-get", "docker", "tensorboard"})
"""Commands that a page may name and this test knows nothing about."""


@dataclass(frozen=True)
class Block:
    language: str
    mark: str
    """What stands behind the language."""
    text: str
    line: int
    """Of its first line, from 1."""


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


@cache
def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    fence: tuple[str, str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if fence is None and line.startswith("```"):
            language, _, mark = line[3:].strip().partition(" ")
            fence, inside = (language, mark, number + 1), []
        elif fence is not None and line.strip() == "```":
            found.append(Block(fence[0], fence[1], "\n".join(inside), fence[2]))
            fence = None
        elif fence is not None:
            inside.append(line)
    assert fence is None, f"{page}: a block that begins at line {fence} never ends"
    return found


def quoted_after(page: Path, block: Block) -> str:
    """The ```text block that follows."""
    following = blocks(page)[blocks(page).index(block) + 1 :]
    assert following and following[0].language == "text", f"{page}:{block.line}: a ```text block with the message must follow"
    return following[0].text


# ----------------------------------------------------------------------------------------------------------------- python


@pytest.fixture
def tiny_service(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`tinker.ServiceClient()` on the torch sampler, where every model name means a random model of two layers."""
    monkeypatch.setenv("PTLAB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(local, "default_engines", lambda: EnginesConfig(sampler=TorchSamplerConfig()))
    monkeypatch.setattr(local, "resolve_model", lambda name, paths: str(request.getfixturevalue("tiny_qwen3_dir")))
    _default_connection.cache_clear()
    yield
    if _default_connection.cache_info().currsize:
        _disconnect(_default_connection())
    _default_connection.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run(page: Path, tiny_service: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        kind, _, reason = block.mark.partition(":")
        if kind == "no-run":
            assert reason.strip(), f"{page}:{block.line}: say why it does not run, as in `python no-run: needs a GPU`"
        elif kind == "raises":
            with pytest.raises(PtlabError) as caught:
                exec(code, namespace)
            assert caught.value.message == quoted_after(page, block), f"{page}:{block.line}"
        else:
            assert not kind, f"{page}:{block.line}: unknown mark {block.mark!r}"
            exec(code, namespace)


# --------------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_what_exists(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs", "docs", "scripts", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)  # the reader's working directory: a checkout that a script of the page may write into
    for block in blocks(page):
        if block.language != "bash":
            continue
        where = f"{page}:{block.line}"
        found = list(commands(run_scripts(block.text, where)))
        if block.mark in ("fails", "warns"):
            [words] = found
            assert refusal_or_warning(words) == quoted_after(page, block), where
            continue
        assert not block.mark, f"{where}: unknown mark {block.mark!r}"
        for words in found:
            check_command(words, f"{where}: {shlex.join(words)}")


def run_scripts(text: str, where: str) -> str:
    """Run each `python - <<'PY' ... PY` of a block here, and return the rest of the block."""
    pattern = re.compile(r"^(.*)\bpython - <<'(\w+)'\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
    for match in pattern.finditer(text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # open(...).write(...) is fine in a script of three lines
            exec(compile(match[3], where, "exec"), {"__name__": "script"})
    return pattern.sub(r"\1", text)


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command: comments, output redirections, what is behind a pipe, and variables set for it are left out. The body of a
    `for` loop is read once, with the first value."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(re.split(r"[|<>&]", part)[0])
            while words and (words[0] in ("do", "done") or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                words = words[1:]
            if words and words[0] == "for":
                variables[words[1]] = words[3]
            elif words:
                filled = [re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), word) for word in words]
                yield [filled[0].removeprefix(".venv/bin/"), *filled[1:]]


def check_command(words: list[str], where: str) -> None:
    program, rest = words[0], words[1:]
    if program == "python" and rest[0] == "-m":
        if rest[1] == "pytest":
            for path in rest[2:]:
                assert path.startswith("-") or (ROOT / path.partition("::")[0]).exists(), where
            return
        module = ROOT.joinpath(*rest[1].split("."))
        source = next((path for path in (module.with_suffix(".py"), module / "__main__.py") if path.exists()), None)
        if source is None:
            assert not rest[1].startswith(("ptlab", "tests")), where
        else:
            check_options(rest[2:], source.read_text(encoding="utf-8"), where)
    elif [program, rest[0]] in (["python", "scripts/train.py"], ["ptlab", "train"]):
        check_training(rest[1:], where)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), where
        check_options(rest[1:], (ROOT / rest[0]).read_text(encoding="utf-8"), where)
    elif program == "ptlab":
        assert rest and rest[0] in cli.COMMANDS, where
        check_options(rest[1:], sources_of_commands(), where)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets, where
    else:
        assert program in NOT_OURS, f"{where}: what is {program!r}? add it to NOT_OURS if it needs no check"


def check_training(words: list[str], where: str) -> None:
    args = train_parser().parse_args(words)
    try:
        load_config(args.config, made_up(args.set))
    except ConfigError as err:
        pytest.fail(f"{where}\n{err.message}")


def made_up(overrides: list[str]) -> list[str]:
    """Overrides whose value is the reader's own (DIR, FILE, path/to/...) point at something that exists; so do files and folders below
    runs/, which earlier commands write, and data files beside the checkout."""
    found = []
    for override in overrides:
        key, _, value = override.partition("=")
        for path in map(Path, re.findall(r"(?<![\w./-])(?:runs/[\w./-]*\w|[\w-]+\.(?:jsonl|json|parquet)\b)", value)):
            if path.suffix in (".jsonl", ".json", ".parquet"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            else:
                path.mkdir(parents=True, exist_ok=True)
        theirs = key.endswith("path") and re.fullmatch(r"[A-Z_]+|(/tmp/|~/|path/to/|my_).*", value)
        stand_in = ROOT / ("docs" if key == "model.path" else "LICENSE")
        found.append(f"{key}={stand_in}" if theirs else override)
    return found


def refusal_or_warning(words: list[str]) -> str:
    """What scripts/train.py prints about the config, prefix and all."""
    assert words[:2] == ["python", "scripts/train.py"], words
    args = train_parser().parse_args(words[2:])
    try:
        return "\n".join(f"warning: {text}" for text in load_config(args.config, args.set).warnings())
    except ConfigError as err:
        return f"error: {err.message}"


def train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False)
    cli.add_train_arguments(parser)
    return parser


def check_options(words: list[str], source: str, where: str) -> None:
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
            assert f'"{option}"' in source or f'"{option[2:].replace("-", "_")}"' in source, f"{where}: there is no {option}"


@cache
def sources_of_commands() -> str:
    """Where the options of `ptlab ...` are defined; those of `ptlab serve` are the fields of its settings."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "ptlab").glob("*.py"))]
    settings = (ROOT / "ptlab" / "server" / "settings.py").read_text(encoding="utf-8")
    return "\n".join([*texts, re.sub(r"^    ([a-z_]+):", r'"\1"', settings, flags=re.MULTILINE)])


# ------------------------------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}; there are {', '.join(sorted(anchors(file)))}"


@cache
def anchors(file: Path) -> frozenset[str]:
    """Names of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE))
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain)


def test_the_hub_leads_to_every_page() -> None:
    linked = set()
    for page in (DOCS / "README.md", DOCS / "recipes-explained.md"):
        targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
        linked |= {(page.parent / target).resolve() for target in targets if "://" not in target}
    missing = [name_of(page) for page in sorted(DOCS.rglob("*.md")) if page.resolve() not in linked and page.name != "README.md"]
    assert missing == [], "docs/README.md lists all pages (those of docs/recipes may stand in docs/recipes-explained.md)"


def test_every_config_stands_beside_the_page_that_explains_it() -> None:
    table = (DOCS / "recipes-explained.md").read_text(encoding="utf-8").split("\n## Pages\n")[1]
    named: set[str] = set()
    for row in re.findall(r"^\| \[.*$", table, re.MULTILINE):
        configs = set(re.findall(r"`([\w/]+)`", row.split("|")[3]))
        named |= configs | {f"smoke/{name}" for name in configs if "each in `smoke`" in row}
    on_disk = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert on_disk == named - {"smoke", "smoke/smoke"}
