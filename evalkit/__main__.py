"""``python -m evalkit``: the same commands as ``evalkit``."""

import sys

from evalkit.cli import main

sys.exit(main())
