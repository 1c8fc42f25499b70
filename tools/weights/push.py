"""Make a folder for the Hugging Face hub, and upload it: of a classifier timm's, of a detector or segmenter our own."""

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .contents import Contents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--model", metavar="NAME", help="model of the file, where it can't be found out")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="must be new or empty")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="upload to this repository of the hub")
    parser.add_argument("--license", help="of the weights, where it isn't known or is another")


def run(args: argparse.Namespace) -> None:
    import os
    import shutil

    from ...tasks import TaskError
    from .contents import load_contents

    if args.repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise TaskError(f"--repo is {args.repo!r}, but must be OWNER/NAME")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise TaskError(f"{args.output}: exists already; name a new folder")
    contents = load_contents(args.file, args.model)
    if contents.task == "backbone":
        raise TaskError(f"{contents.file.path}: holds a backbone alone; push a classifier, a detector or a segmenter")
    entry = contents.file.entry
    stated = args.license or (entry.license if entry else None)
    if args.repo and not stated:
        raise TaskError("the license of these weights is not known, so that they can't be published; give --license")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    folder = args.output.with_name(f".{args.output.name}-{os.getpid()}")
    folder.mkdir()
    try:
        write = _write_classifier if contents.task == "classify" else _write_dense
        write(contents, folder, stated, args)
        # safetensors' files are private otherwise.
        shutil.copymode(folder / "README.md", folder / "model.safetensors")
        if args.output.exists():
            args.output.rmdir()
        folder.rename(args.output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    use = f"timm.create_model('local-dir:{args.output}', pretrained=True) reads it, after import foveate"
    if contents.head:
        use = f"foveate.load('{args.output / 'model.safetensors'}') reads it"
    print(f"{args.output}: {use}")
    if args.repo:
        _upload(args.output, args.repo)


def _write_classifier(contents: "Contents", folder: Path, stated: str | None, args: argparse.Namespace) -> None:
    """Fill a folder as timm's `save_for_hf` does."""
    from timm.models import save_for_hf
    from timm.models._hub import generate_readme

    rule = contents.predictor.rule
    data = dict(
        input_size=(rule.channels, rule.size, rule.size),
        mean=rule.mean,
        std=rule.std,
        interpolation=rule.interpolation,
        crop_pct=rule.crop_pct,
        crop_mode=rule.crop_mode,
    )
    labels = {"label_names": contents.predictor.classes}
    save_for_hf(contents.model, str(folder), model_config=labels, data_config=data, safe_serialization=True)
    _settle_config(folder / "config.json", contents, stated)
    card = generate_readme(_card(contents, stated, args.repo), (args.repo or args.output.name).rpartition("/")[2])
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_dense(contents: "Contents", folder: Path, stated: str | None, args: argparse.Namespace) -> None:
    """Fill a folder with a detector or segmenter: its weights, which say what they are of, and the same as JSON."""
    from .card import Findings, card_of
    from .convert import save_contents

    save_contents(contents, folder / "model.safetensors", stated)
    config = {"library_name": "foveate", "architecture": contents.title, "card": contents.card()}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    where = f'hf_hub_download("{args.repo}", "model.safetensors")' if args.repo else '"FOLDER/model.safetensors"'
    card = card_of(contents, Findings(), stated, usage_of(contents, where))
    (folder / "README.md").write_text(card, encoding="utf-8")


def usage_of(contents: "Contents", where: str) -> str:
    """Return lines of Python that use a file; ``where`` is the expression that names it."""
    lines = ["from huggingface_hub import hf_hub_download", ""] if where.startswith("hf_hub") else []
    if contents.task == "backbone":
        lines += ["import foveate", "", f'maps = foveate.create_backbone("{contents.name}", checkpoint={where})']
    else:
        lines += ["import foveate", "", f'results = foveate.load({where}).predict("photo.jpg")']
    return "\n".join(lines)


def _settle_config(path: Path, contents: "Contents", stated: str | None) -> None:
    """Leave out of timm's file what transformers refuses, and what is said of other weights than these."""
    config = json.loads(path.read_text(encoding="utf-8"))
    # It stands at the top, too, and transformers gives both to timm.
    config.get("model_args", {}).pop("num_classes", None)
    described = config["pretrained_cfg"]
    described.pop("license", None)
    if stated:
        described["license"] = stated
    if contents.file.entry is None:
        for key in ("tag", "notes", "paper_ids", "paper_name"):
            described.pop(key, None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _card(contents: "Contents", stated: str | None, repo: str | None) -> dict:
    cfg = contents.model.pretrained_cfg
    where = f"hf-hub:{repo}" if repo else "local-dir:FOLDER"
    details = {
        "Model Type": "Image classification",
        "Architecture": contents.name,
        "Params (M)": f"{sum(parameter.numel() for parameter in contents.model.parameters()) / 1e6:.1f}",
        "Origin": cfg.get("origin_url") or "not stated",
        "Papers": cfg.get("paper_ids") or "not stated",
        "File": f"{contents.file.path.name}, sha256 {contents.file.sha256}",
    }
    entry = contents.file.entry
    if entry:
        details |= {"Dataset": "ImageNet-1k" if entry.data == "imagenet-1k" else "ImageNet-22k"}
        details |= {f"Stated {name}": value for name, value in entry.stated.items()}
    numbers = "; the numbers are the authors'" if entry and entry.stated else ""
    unknown = {} if stated else {"license_name": "not-stated"}
    return unknown | {
        "license": stated or "other",
        "tags": ["image-classification", "timm", "foveate"],
        "description": f"{contents.name}, converted by `foveate weights push`{numbers}.",
        "details": details,
        "usage": (
            f'```python\nimport foveate, timm  # foveate registers the model\n\nmodel = timm.create_model("{where}", '
            "pretrained=True).eval()\n```"
        ),
    }


def _upload(folder: Path, repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    from ...tasks import TaskError
    from ...zoo.library_errors import first_line

    api = HfApi(library_name="foveate")
    try:
        api.create_repo(repo, exist_ok=True)
        print(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add model"))
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = first_line(error)
        raise TaskError(f"{folder} is complete, but not uploaded to {repo}: {reason}") from error
