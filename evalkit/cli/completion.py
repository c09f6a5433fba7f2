"""Completion of commands, options and file names in the shell.

The script is made once from the parser (by shtab) and holds every name, so that a press of TAB starts no Python.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from evalkit.errors import UsageError
from evalkit.util.outputs import writing
from evalkit.util.user_files import placed

SHELLS = ("bash", "zsh", "fish")


def script(parser: argparse.ArgumentParser, shell: str | None = None) -> str:
    """The completion script of ``parser`` for ``shell``; None is the shell that the user logs in with.

    Raises:
        UsageError: no shell was named, and the user's is unknown.
    """
    import shtab

    shell = shell or _own_shell()
    parsers = [parser]
    while parsers:
        for action in parsers.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
            elif action.type is placed:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def install(parser: argparse.ArgumentParser, shell: str | None = None) -> str:
    """Write the script where ``shell`` looks for it; returns what was written and what is left to do.

    Raises:
        UsageError: no shell was named, and the user's is unknown; the file cannot be written.
    """
    shell = shell or _own_shell()
    path, then = {
        "bash": (_base("XDG_DATA_HOME", ".local/share") / "bash-completion/completions/evalkit", "source {path}  # in ~/.bashrc"),
        "zsh": (placed("~/.zfunc/_evalkit"), "fpath+=({folder}); autoload -Uz compinit; compinit  # in ~/.zshrc"),
        "fish": (_base("XDG_CONFIG_HOME", ".config") / "fish/completions/evalkit.fish", ""),
    }[shell]
    with writing(path, "the completion script"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(parser, shell) + "\n", encoding="utf-8")
    left = f"\nif a new shell does not complete evalkit: {then.format(path=path, folder=path.parent)}" if then else ""
    return f"completion for {shell}: {path}{left}"


def _base(variable: str, default: str) -> Path:
    """The folder that the XDG ``variable`` names, or ``default`` in the home folder."""
    return Path(os.environ.get(variable) or placed("~") / default)


def _own_shell() -> str:
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        what = f"completion is not made for the shell '{name}'" if name else "your shell is not known"
        raise UsageError(what, fix=f"name one behind the option: {', '.join(SHELLS)}")
    return name
