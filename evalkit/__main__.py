"""``python -m evalkit``: the commands of ``evalkit``; under torchrun the first process does the work, the others help train."""

import os
import sys

from evalkit.cli import main, plug_in
from evalkit.errors import EvalkitError
from evalkit.util.terminal import say


def together() -> int:
    """The command in the first process, help in the others."""
    from evalkit.training.loop.distributed import command

    try:
        return command(main, prepare=plug_in)
    except EvalkitError as error:
        say(f"evalkit: {error}", error=True)
        return error.exit_code


sys.exit(together() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else main())
