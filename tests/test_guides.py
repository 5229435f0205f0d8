"""The guides hold: what they show is run, commands that they name exist, and so do their links.

`scripts/guides` mends outputs, pictures and the doctor's table. Each check is shown to find what it
is for.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ailments
import guides
import pytest
import typer

from cluster.cli import app
from meshinfer.errors import BY_NAME

ROOT = guides.ROOT
TROUBLE = guides.DOCS / "troubleshooting.md"
COMMANDS: Any = typer.main.get_command(app)
PICTURE_BYTES = 300 << 10
BESIDE_ERRORS = {0, 1, 130}
"""Exit codes of no error class: all went well; some inputs did not; Ctrl-C."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


pages = pytest.mark.parametrize("page", guides.PAGES, ids=name_of)


# --- what is run


IN_CI = ("one-machine.md", "your-own-model.md")
"""Of the guides that are run; the others take a minute and run with --full."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name_of(path), marks=() if path.name in IN_CI else pytest.mark.slow)
        for path in guides.GUIDES
    ],
)
def test_a_guide_runs_to_the_letter_and_prints_what_it_shows(path: Path, tmp_path: Path) -> None:
    page = path.read_text()
    for ran in guides.run_guide(page, tmp_path, path.name):
        where = f"{path.name}:{ran.block.line}"
        assert ran.code == 0, f"{where} failed:\n{ran.output}"
        shown = ran.shown
        assert shown is None or guides.fits(shown.text, ran.output), f"{where}:\n{ran.output}"
    for name in guides.pictures(page):
        made, kept = (folder / name for folder in (tmp_path, guides.DOCS / "pictures"))
        assert guides.masked(made.read_text()) == guides.masked(kept.read_text()), (
            f"{name} is not what {path.name} draws: scripts/guides {path.stem}"
        )


def test_what_a_block_prints_is_held_against_what_is_shown(tmp_path: Path) -> None:
    page = (
        "```sh run\necho 1.5 s; cd cluster\n```\n\n```text\n2.25 s\n```\n"
        "```python run\nx = 1\n```\n```sh run\nbasename $PWD\n```\n\n```text\nelsewhere\n```\n"
        "```python run\nprint(x)\nundefined\n```\n```sh run\nfalse\n```\n"
    )
    first, assigns, second, raises, fails = guides.run_guide(page, tmp_path, "page")
    assert first.shown is not None and guides.fits(first.shown.text, first.output)
    assert (assigns.code, assigns.output, assigns.shown) == (0, "", None)
    assert second.shown is not None and not guides.fits(second.shown.text, second.output)
    assert raises.code == 1 and "NameError: name 'undefined'" in raises.output
    assert fails.code == 1


def test_what_is_said_in_between_is_not_taken_for_an_output(tmp_path: Path) -> None:
    page = "```sh run\necho a\n```\n\nAnother:\n\n```text\nb\n```\n"
    (ran,) = guides.run_guide(page, tmp_path, "page")
    assert ran.shown is None


def test_dots_stand_for_anything_and_numbers_for_numbers() -> None:
    assert guides.fits("pi-1  ready ...\n", "pi-1 ready  4 cores\n")
    assert guides.fits("a\n...\nz\n", "a\nb\nc\nz\n")
    assert not guides.fits("pi-1  ready\n", "pi-1 ready  4 cores\n")
    assert not guides.fits("12 ms\n", "12 s\n")


@pages
def test_python_that_is_shown_and_not_run_is_python(page: Path) -> None:
    for block in guides.blocks(page.read_text()):
        if block.language == "python":
            ast.parse(block.text, f"{page.name}:{block.line}")


def test_pictures_are_few_and_each_is_shown() -> None:
    kept = {path.name: path for path in (guides.DOCS / "pictures").iterdir()}
    shown = {name for path in guides.GUIDES for name in guides.pictures(path.read_text())}
    assert set(kept) == shown
    assert sum(path.stat().st_size for path in kept.values()) < PICTURE_BYTES


# --- what is named


UsageError: type[Any] = typer.BadParameter.__mro__[1]  # of click, or of typer's own copy of it


def understand(words: list[str], *, whole: bool) -> None:
    """As the command line would, without doing anything; its own error where it would not."""
    command: Any = COMMANDS
    name = "meshinfer"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            raise typer.BadParameter(f"there is no command {name} {words[0]}")
        command, name, words = command.commands[words[0]], f"{name} {words[0]}", words[1:]
    try:
        with command.make_context(name, list(words)):
            pass
    except typer.Exit:  # --help, --version
        return
    except UsageError as error:
        named_only = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError")
        if not named_only or (whole and not hasattr(command, "commands")):
            raise


@pages
def test_every_command_that_is_shown_exists_with_its_options(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [each for each in os.environ if each.startswith("MESHINFER_")]:
        monkeypatch.delenv(variable)
    for words, whole in guides.commands_of(page.read_text()):
        try:
            understand(words, whole=whole)
        except UsageError as error:
            pytest.fail(f"{page.name}: meshinfer {' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```sh\nmeshinfer deploy a b.onnx --sprad\n```", "No such option"),
        ("```sh\nsudo X=1 meshinfer tokn | meshinfer join -\n```", "no command meshinfer tokn"),
        ("```sh\nssh pi 'sudo meshinfer worker --instal'\n```", "No such option"),
        ("```sh\nmeshinfer lab run -- meshinfer coordinator --prt 1\n```", "No such option"),
        ("```sh\nmeshinfer deploy only-a-name\n```", "Missing argument"),
        ("```sh\nmeshinfer devices aprove x\n```", "no command meshinfer devices aprove"),
        ("Say `meshinfer devices --wach` there.", "No such option"),
        ("```sh\nmeshinfer infer \\\n  a b.jpg --otu c\n```", "No such option"),
    ],
)
def test_a_command_or_option_that_is_not_there_is_found(text: str, wrong: str) -> None:
    found = list(guides.commands_of(text))
    assert found
    said = []
    for words, whole in found:
        try:
            understand(words, whole=whole)
        except UsageError as error:
            said.append(error.format_message())
    assert len(said) == 1 and wrong in said[0]


def test_a_command_is_found_wherever_a_shell_would_run_it() -> None:
    text = (
        "```sh\nexport A=1\nfor i in 1 2; do meshinfer token > t; done\n"
        "pip install meshinfer\nX=1 /opt/meshinfer/bin/meshinfer worker &\n```\n`meshinfer demo`"
    )
    found = [words for words, _ in guides.commands_of(text)]
    assert found == [["token"], ["worker"], ["demo"]]


@pages
def test_every_variable_that_is_named_is_read_somewhere(page: Path) -> None:
    def options(command: Any) -> Iterator[str]:
        for param in command.params:
            names = param.envvar if isinstance(param.envvar, list | tuple) else [param.envvar]
            yield from filter(None, names)
        for each in getattr(command, "commands", {}).values():
            yield from options(each)

    code = "\n".join(path.read_text() for path in (ROOT / "cluster").rglob("*.py"))
    prefixed = {
        f"MESHINFER_{name}_{param.name}".upper()
        for name, command in COMMANDS.commands.items()
        for param in command.params
    }
    known = {*re.findall(r"MESHINFER_[A-Z_]+", code), *options(COMMANDS), *prefixed}
    assert set(re.findall(r"MESHINFER_[A-Z]+(?:_[A-Z]+)*", page.read_text())) <= known


@pages
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page.name} links to {target}"


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


def test_the_readme_leads_to_every_guide() -> None:
    text = (ROOT / "README.md").read_text()
    assert [path.name for path in guides.GUIDES if f"docs/{path.name}" not in text] == []


# --- exit codes and the doctor


@pages
def test_exit_codes_that_are_named_exist(page: Path) -> None:
    known = {kind.exit_code for kind in BY_NAME.values()} | BESIDE_ERRORS
    named = re.findall(r"exit codes? ((?:\d+(?:, | and | or )?)+)", page.read_text())
    assert {int(code) for text in named for code in re.findall(r"\d+", text)} <= known


def test_the_table_of_exit_codes_is_that_of_the_errors() -> None:
    rows = re.findall(r"^\| (\d+) \|([^|]*)\|", TROUBLE.read_text(), re.MULTILINE)
    told = {kind: int(code) for code, kinds in rows for kind in re.findall(r"`(\w+)`", kinds)}
    assert told == {name: kind.exit_code for name, kind in BY_NAME.items()}
    assert {int(code) for code, _ in rows} >= BESIDE_ERRORS


def test_the_doctors_table_is_made_of_what_its_judges_say_now() -> None:
    page = TROUBLE.read_text()
    told = page.partition(ailments.BEGIN)[2].partition(ailments.END)[0].strip()
    assert told == ailments.table(ailments.ailments()), "run scripts/guides troubleshooting"


def phrases(path: Path) -> Iterator[str]:
    """Of a file that judges: each piece of text that it may say."""
    tree = ast.parse(path.read_text())
    said = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in said else None
        if isinstance(text, str) and len(text) > 12:
            yield text


FINE = (
    "computes on this processor ()", "and writing works", "mDNS uses", "is reached through",
    "is announced by", "admits us", "everywhere, protocol", "no other device is named",
    "is this machine,", "does not run; its port", "this is", "none but loopback",
)  # fmt: skip
"""What is said where all is well."""


def test_everything_that_a_judge_can_say_is_in_the_guide() -> None:
    page = TROUBLE.read_text().replace("\\|", "|").replace("&lt;", "<")
    flat = " ".join(page.split())
    missing = [
        text
        for path in sorted((ROOT / "meshinfer" / "doctor").glob("*.py"))
        for text in phrases(path)
        if " " in text
        and " ".join(text.split()) not in flat
        and not any(each in f"{text}()" for each in FINE)
    ]
    assert missing == []


def test_a_phrase_that_is_new_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "network.py"
    shutil.copy(ROOT / "meshinfer" / "doctor" / "network.py", copy)
    copy.write_text(copy.read_text() + '\nNEW = f"the moon is in the {1} house today"\n')
    assert {"the moon is in the ", " house today"} & set(phrases(copy))
