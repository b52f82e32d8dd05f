"""Hooks of mkdocs: reference pages from the schema and the table of commands, and pages that lie outside docs/.

Used by mkdocs.yml; `mkdocs build --strict` makes the site, in which a broken link is an error.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from ade_harness.cli.commands import COMMANDS, EVERYWHERE, Command
from ade_harness.config.files import choices
from ade_harness.config.probe import ProbeConfig
from ade_harness.config.schema import Config

ROOT = Path(__file__).parents[1]
NOTEBOOK = "notebooks/first_evaluation.ipynb"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made of code, and those of other folders."""
    made = {
        "reference/options.md": options_page(),
        "reference/commands.md": commands_page(),
        "slurm.md": _without_links_to_code((ROOT / "slurm/README.md").read_text(encoding="utf-8")),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "first-evaluation.md": notebook_page(ROOT / "docs" / NOTEBOOK),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside docs/ at their page of the site."""
    return markdown.replace("](../slurm/README.md)", "](slurm.md)")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out the sign that begins an example in a docstring."""
    return html.replace("<p>::</p>", "")


def _without_links_to_code(markdown: str) -> str:
    """Return a page of another folder with its links to docs/, and names of files in place of links to them."""
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!docs/)[^)]+\)", r"\1", markdown).replace("](../docs/", "](")


# options


def options_page() -> str:
    """Return a table of every option: key, type, default, meaning."""
    lines = [
        "# Options",
        "",
        "Every option of `evaluate`, and with `probe.*` of `probe`, as `key=value` on the command line. Made from the"
        " schema (`ade_harness.config`); `--cfg job` prints the values of a run.",
    ]
    for one in fields(Config):
        kind = _node(get_type_hints(Config)[one.name])
        lines += ["", f"## {one.name}", "", _sentence(kind), ""]
        named = (
            choices(one.name) if one.name in ("model", "dataset", "inference", "runtime", "tracking", "probe") else []
        )
        if named:
            lines += [f"Choices: {', '.join(f'`{one.name}={name}`' for name in named)}.", ""]
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(note)} |"
            for key, kind, default, note in _rows(kind, one.name)
        ]
    return "\n".join(lines) + "\n"


def _node(hint: Any) -> Any:
    """Return the dataclass of a field that may be null."""
    return ProbeConfig if ProbeConfig in get_args(hint) else hint


def _sentence(kind: Any) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def _rows(kind: Any, prefix: str) -> list[tuple[str, str, str, str]]:
    types, notes = get_type_hints(kind), _comments(kind)
    rows: list[tuple[str, str, str, str]] = []
    for one in fields(kind):
        key, hint = f"{prefix}.{one.name}", types[one.name]
        if is_dataclass(hint):
            rows += _rows(hint, key)
        else:
            rows.append((key, _type(hint), _default(one), _limits(one, notes.get(one.name, ""))))
    return rows


def _type(hint: Any) -> str:
    parts = [part for part in get_args(hint) if part is not type(None)] if type(None) in get_args(hint) else []
    if parts:
        return f"{_type(parts[0])} or null"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        notes = _comments(hint)
        return ", ".join(f"`{m.value}`" + (f" ({notes[m.value]})" if notes.get(m.value) else "") for m in hint)
    return f"`{getattr(hint, '__name__', hint) if not get_args(hint) else hint}`".replace("typing.", "")


def _default(one: Field[Any]) -> str:
    value = (
        one.default
        if one.default is not MISSING
        else one.default_factory()
        if one.default_factory is not MISSING
        else None
    )
    if value == "???":
        return "of the choice"
    return f"`{json.dumps(value)}`" if not isinstance(value, StrEnum) else f"`{value.value}`"


def _limits(one: Field[Any], note: str) -> str:
    limits = one.metadata.get("range")
    expected = "" if limits is None else limits.of_list() if "list" in str(one.type) else str(limits)
    return "; ".join(text for text in (note, expected) if text)


def _comments(kind: Any) -> dict[str, str]:
    """Return what stands behind each field in the source, or on the lines above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        comment = re.fullmatch(r"\s+# (.*)", line)
        field = re.match(r"\s{4}(\w+)(?::[^#=]+)?(?: = |$)", line)
        if comment:
            above.append(comment[1])
            continue
        if field:
            behind = re.search(r"  # (.*)$", line)
            found[field[1]] = " ".join([*above, behind[1]] if behind else above)
        above = []
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# commands


def commands_page() -> str:
    """Return every command with its options, as --help says them."""
    lines = [
        "# Commands",
        "",
        "`python -m ade_harness COMMAND`, or `ade-harness COMMAND`. Without a command it evaluates.",
    ]
    for command in COMMANDS:
        lines += ["", f"## {command.name}", "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
        lines += _options(command)
    lines += ["", "## Everywhere", "", "| | |", "|---|---|"]
    lines += [f"| `{', '.join(a.names)}` | {_cell(str(a.settings.get('help', '')))} |" for a in EVERYWHERE]
    return "\n".join(lines) + "\n"


def _options(command: Command) -> list[str]:
    if not command.arguments:
        return ["It has no options of its own."]
    lines = ["| | |", "|---|---|"]
    for argument in command.arguments:
        names = ", ".join(argument.names)
        value = argument.settings.get("metavar") or ("" if argument.settings.get("action") else "VALUE")
        shown = f"{names} {value}" if names.startswith("-") else str(value or names)
        lines.append(
            f"| `{_cell(shown.strip())}` | {_cell(str(argument.settings.get('help', '')).replace('%%', '%'))} |"
        )
    return lines


# the notebook


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its text and its code; a test runs it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"
