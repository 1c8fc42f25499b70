"""Labels of images as classes: their order, and their numbers."""

import re
from collections.abc import Iterable, Mapping

from .. import TaskError, nearest


def is_number(label: str) -> bool:
    """Return whether a label is a whole number, of few enough digits that Python reads them."""
    return re.fullmatch("-?[0-9]{1,18}", label) is not None


def classes_of(labels: Iterable[str]) -> list[str]:
    """Return labels once each, in order; numbers by their value if all are."""
    labels = {*labels}
    return sorted(labels, key=(lambda label: (int(label), label)) if all(map(is_number, labels)) else None)


def number_of(label: str, indices: Mapping[str, int], where: str) -> int:
    """Return the index of a label's class.

    Args:
        label: Of an image.
        indices: Of the classes' names.
        where: What has the label, for the message.

    Raises:
        TaskError: If the label is none of the classes.
    """
    if label not in indices:
        raise TaskError(f"{where}: there is no class {label!r}{nearest(label, indices)}")
    return indices[label]
