"""The card of a file of weights, in the form that hub users know: what it is, whose, and what was found in it."""

import dataclasses
import datetime
import platform
from typing import Any

from .contents import Contents

_PIPELINES = {
    "classify": "image-classification",
    "detect": "object-detection",
    "segment": "image-segmentation",
    "backbone": "image-feature-extraction",
}


@dataclasses.dataclass
class Findings:
    """What came out when a file was looked into.

    Attributes:
        answers: What the model says about a photo, by the photo's name.
        difference: Greatest absolute difference of the outputs to recorded ones of the authors' code; None if there
            was nothing to compare with.
        reference: What they were recorded of.
        measured: Metrics in percent, by the authors' names.
        data: What they were measured on.
        command: What measures them again.
    """

    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    difference: float | None = None
    reference: str = ""
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    data: str = ""
    command: str = ""


def checked_row(findings: Findings, by: str) -> dict[str, Any]:
    """Return what the row of these weights in ``zoo/weights.json`` may say as ``checked``."""
    row = {"date": datetime.date.today().isoformat(), "by": by}
    if findings.difference is not None:
        row["difference"] = float(f"{findings.difference:.2g}")
    return row | {"measured": {name: round(value, 2) for name, value in findings.measured.items()}}


def card_of(contents: Contents, findings: Findings, license: str | None, usage: str, made_by: str = "") -> str:
    """Return a card in markdown, with the head that the hub reads.

    Args:
        contents: What the file holds.
        findings: What was found in it.
        license: SPDX name; None if none is stated.
        usage: Lines of Python that use the file.
        made_by: Command that made it, if it was made here.
    """
    from huggingface_hub import EvalResult, ModelCardData

    entry = contents.file.entry
    name = entry.name if entry else contents.title
    results = [
        EvalResult(
            task_type=_PIPELINES[contents.task],
            dataset_type=findings.data.split(",")[0],
            dataset_name=findings.data,
            metric_type=metric,
            metric_value=round(value, 2),
        )
        for metric, value in findings.measured.items()
    ]
    head = ModelCardData(
        model_name=name,
        license=license or "other",
        license_name=None if license else "not-stated",
        library_name="timm" if contents.task == "classify" else "foveate",
        pipeline_tag=_PIPELINES[contents.task],
        tags=["foveate", "timm", contents.name],
        eval_results=results or None,
    )
    facts = [f"* **{label}:** {fact}" for label, fact in _facts(contents, findings, license, made_by)]
    answers = [f"* {photo}: {answer}" for photo, answer in findings.answers.items()]
    seen = ["## What it says about a photo", "\n".join(answers)] if answers else []
    parts = [f"---\n{head}\n---", f"# {name}", "\n".join(facts), "## Use", f"```python\n{usage}\n```", *seen]
    return "\n\n".join(parts) + "\n"


def _facts(contents: Contents, findings: Findings, license: str | None, made_by: str) -> list[tuple[str, str]]:
    from ...zoo.states import code_state

    file, entry = contents.file, contents.file.entry
    parameters = sum(parameter.numel() for parameter in contents.model.parameters())
    source = made_by or (entry.page if entry else "not stated")
    compared = f"not compared with this file; the code: {code_state(contents.name) or 'that of timm'}"
    if findings.difference is not None:
        compared = f"{findings.difference:.1e} ({findings.reference})"
    measured = "; ".join(f"{metric} {value:.2f}" for metric, value in findings.measured.items())
    by = f" by `{findings.command}`" if findings.command else ""
    stated = ", ".join(f"{metric} {value:g}" for metric, value in entry.stated.items()) if entry else ""
    facts = [
        ("Model", f"{contents.title}, {parameters / 1e6:.2f} M parameters"),
        ("File", f"{file.path.name}, {file.path.stat().st_size} bytes"),
        ("sha256", f"`{file.sha256}`"),
        ("Source", source),
        ("License", license or "none is stated"),
        ("Date", datetime.date.today().isoformat()),
        ("Versions", _versions()),
        ("Loaded", contents.report()),
        ("Max abs difference to the authors' code", compared),
        ("Measured", f"{measured} on {findings.data}{by}" if measured else "no accuracy was measured"),
    ]
    return facts + ([("Stated by the authors", stated)] if stated and not made_by else [])


def _versions() -> str:
    from importlib.metadata import version

    named = [f"{package} {version(package)}" for package in ("foveate", "torch", "timm")]
    return ", ".join([*named, f"Python {platform.python_version()}", platform.system()])
