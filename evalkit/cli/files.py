"""Commands about files: the suite file, packaged models and text, the results file."""

from __future__ import annotations

import argparse

from evalkit.cli.parser import Command, Parser, add_suite
from evalkit.errors import UsageError
from evalkit.util.registry import near_miss
from evalkit.util.terminal import say


def _declare_suite(p: Parser) -> None:
    add_suite(p, nargs="?", help="suite file to check")
    p.reference = _suite_reference


def _suite_reference() -> str:
    from evalkit.suite import suite_help

    return suite_help()


def suite(a: argparse.Namespace) -> int:
    from evalkit.suite import load_suite

    if a.suite is None:
        raise UsageError("name a suite file to check, or ask for --help", fix="evalkit suite suites/quickstart.toml")
    loaded = load_suite(a.suite, train_only=True)
    say(
        f"{a.suite}: fine; {len(loaded.dictionaries)} dictionaries, {len(loaded.hook_points)} hook points, "
        f"{len(loaded.evaluations)} evaluations"
    )
    return 0


def _declare_assets(p: Parser) -> None:
    p.add_argument("action", choices=("list", "install", "verify"))
    p.add_argument("names", nargs="*", help="assets (default: all)")


def assets(a: argparse.Namespace) -> int:
    from evalkit.assets.install import install, status, verify
    from evalkit.util.progress import Progress

    known = [asset.name for asset in status()]
    for name in a.names:
        if name not in known:
            raise UsageError(f"there is no asset called '{name}'", fix=near_miss(name, known))
    names = a.names or known
    if a.action == "install":
        install(names, Progress())
    elif a.action == "verify":
        verify(names, Progress())
    for asset in status():
        if asset.name in names:
            state = "installed" if asset.installed else "not installed"
            say(f"{asset.name:30} {asset.bytes / 1e6:9,.1f} MB  {state:14}{asset.licence}; {asset.what}")
    return 0


def _declare_rebuild(p: Parser) -> None:
    """It takes the results file alone."""


def rebuild(a: argparse.Namespace) -> int:
    from evalkit.store.writer import rebuild

    say(rebuild(a.results.parent, a.results))
    return 0


COMMANDS = {
    "suite": Command("reference of the suite file; check one", _declare_suite, suite),
    "assets": Command("packaged models and corpora, checked by hash", _declare_assets, assets),
    "rebuild": Command("make the results file anew from the journals of the runs", _declare_rebuild, rebuild),
}
