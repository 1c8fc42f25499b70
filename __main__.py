"""``python -m foveate`` is the command `foveate`."""

import sys
from pathlib import Path

# Where it is started in the package's own folder, Python would find kernels/ there by that name: transformers, which
# mmengine loads with peft, looks for such a package, and operators that are registered twice crash the process.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from .tools.cli import main  # noqa: E402

sys.exit(main())
