"""Training and evaluation of any task; the only package that imports mmengine.

What mmengine 0.10.7 does not do with a current torch is done here: checkpoints without pickled objects, mixed
precision on any device, processes on CPU, resuming that is exact, between epochs and inside them, or refused.
"""

from .. import TaskError
from ..extras import missing

try:
    # mmengine's Runner imports it, and the wheel with a window system needs libraries that slim containers lack.
    import cv2  # noqa: F401
except ModuleNotFoundError as error:
    raise TaskError(missing("cv2")) from error
except ImportError as error:
    raise TaskError(
        f"OpenCV can't be imported ({str(error).splitlines()[0]}); cure: "
        "pip install --force-reinstall --no-deps opencv-python-headless"
    ) from error

from .config import DEFAULTS, config_of, format_config, load_config
from .train import evaluate, is_main_process, train

__all__ = ["DEFAULTS", "config_of", "evaluate", "format_config", "is_main_process", "load_config", "train"]
