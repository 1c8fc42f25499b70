"""``python -m foveate`` is the command `foveate`."""

import sys

from .tools.cli import main

sys.exit(main())
