"""Pages of the site that are made from the code, so that they cannot drift from it."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from iobs_onnx.cli import make_parser
from iobs_onnx.config import PruneConfig
from iobs_onnx.sparsity import NM

_MARKS = {"<!-- options -->": "options", "<!-- commands -->": "commands"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks in a page; called by mkdocs."""
    for mark, name in _MARKS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, {"options": options, "commands": commands}[name]())
    return markdown


def options() -> str:
    """Return a section for each field of PruneConfig."""
    lines = []
    defaults = PruneConfig(sparsity=NM(2, 4))
    for field in dataclasses.fields(PruneConfig):
        how = field.metadata["how"]
        flag = "--" + field.name.replace("_", "-")
        flag = flag.replace("--", "--no-", 1) if field.default is True else flag
        required = field.default is dataclasses.MISSING
        value = "required" if required else f"default `{_toml(getattr(defaults, field.name))}`"
        choices = ", ".join(f"`{choice}`" for choice in how.get("choices") or ())
        lines += [
            f"### `{field.name}`\n",
            f"{field.metadata['help'].replace('%%', '%').capitalize()}.\n",
            f"Flag `{flag}`; in TOML `{field.name}`; {value}."
            + (f" One of {choices}." if choices else "")
            + (" May be repeated; a list in TOML." if how.get("action") == "append" else "")
            + "\n",
        ]
    return "\n".join(lines)


def commands() -> str:
    """Return the usage and the arguments of every command."""
    parser = make_parser()
    found = next(action for action in parser._actions if action.metavar == "COMMAND")
    lines = []
    for name, command in dict(found.choices or {}).items():
        lines += [f"## `iobs-onnx {name}`\n", f"{command.description}\n"]
        lines += ["| argument | meaning |", "|---|---|"]
        for action in command._actions:
            if name == "prune" and action.dest in {f.name for f in dataclasses.fields(PruneConfig)}:
                continue
            lines.append(f"| {_argument(action)} | {(action.help or '').replace('|', '&#124;')} |")
        lines.append("")
        if name == "prune":
            lines.append("All other options are on [their own page](options.md).\n")
    return "\n".join(lines)


def _argument(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    value = action.metavar or (" or ".join(map(str, action.choices)) if action.choices else "")
    shown = f" `{value}`" if value and action.nargs != 0 else ""
    return names + shown if names else shown


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)
