"""Draws the picture of attention on the page of each family: `python .ci/pictures.py [FAMILY ...]`.

Random weights, on the photo that comes with matplotlib (by the US Navy, in the public domain): what may be used is the
operator's; how it is weighed, training decides.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The model that is drawn, of each family whose attention is read.
MODELS = {
    "nat": "nat_mini",
    "biformer": "biformer_tiny",
    "dat": "dat_pp_tiny",
    "quadtree": "quadtree_b0",
    "dual": "foveate_davit_tiny",
    "agent": "agent_swin_tiny",
    "inline": "inline_swin_tiny",
    "transnext": "transnext_micro",
    "overlock": "overlock_xt",
    "van": "van_b0",
    "shiftvit": "shiftvit_light_tiny",
    "litv2": "litv2_small",
    "ela": "ela_l_mobilenetv2",
    "gated": "cbam_resnet50",
    "host": "foveate_host_tiny",
}
WIDTH = 640
QUALITY = 35


def draw(family: str) -> None:
    """Draw what one query of a family's model uses in each stage, as a small WebP."""
    from matplotlib import cbook
    from PIL import Image

    photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with tempfile.TemporaryDirectory() as folder:
        command = ["attend", str(photo), "--model", MODELS[family], "--untrained", "--at", "300,250"]
        done = subprocess.run(
            [sys.executable, "-m", "foveate", *command, "--output", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{family}: {done.stderr.strip()}", flush=True)
            return
        (path,) = Path(folder).glob("*.png")
        picture = Image.open(path).convert("RGB")
    picture.thumbnail((WIDTH, 10 * WIDTH))
    path = ROOT / "docs" / "images" / f"attend_{family}.webp"
    picture.save(path, quality=QUALITY, method=6)
    print(f"{family}: {path.name}, {path.stat().st_size} bytes", flush=True)


for name in sys.argv[1:] or MODELS:
    draw(name)
