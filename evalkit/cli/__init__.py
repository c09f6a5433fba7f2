"""The command line of evalkit: what can be typed, and what each command does.

``entry`` runs one command; ``parser`` reads what was typed; ``completion`` makes the shell complete it. Each group of commands
is a module: ``run``, ``look``, ``train``, ``files``.
"""

from evalkit.cli.entry import COMMANDS as COMMANDS
from evalkit.cli.entry import main as main
from evalkit.cli.entry import plug_in as plug_in
