"""What is wrong with a data set's annotations, collected, so that one message lists all of it with counts."""

from pathlib import Path

from . import TaskError

# What each kind of fault is called for one and for many of them.
KINDS = {
    "image": ("missing image", "missing images"),
    "pair": ("image without a label map", "images without a label map"),
    "damaged": ("damaged file", "damaged files"),
    "size": ("mask of another size than its image", "masks of another size than their image"),
    "value": ("label map with unknown values", "label maps with unknown values"),
    "box": ("box outside its image", "boxes outside their image"),
    "flat": ("box that isn't four numbers with a positive width and height",) * 2,
    "polygon": ("empty polygon", "empty polygons"),
    "category": ("unknown category", "unknown categories"),
    "owner": ("annotation of an unknown image", "annotations of unknown images"),
    "id": ("duplicate id", "duplicate ids"),
    "segment": ("segment that differs from its picture", "segments that differ from their picture"),
}


class Faults:
    """The faults of one data set, by kind.

    Args:
        source: File or folder that holds the annotations; every message begins with it.
    """

    def __init__(self, source: str | Path):
        self.source = source
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, where: object) -> None:
        """Note a fault of a kind of `KINDS` at a place, such as ``"annotation 7"`` or a file's name."""
        self.found.setdefault(kind, []).append(str(where))

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def __str__(self) -> str:
        listed = []
        for kind in KINDS:
            places = self.found.get(kind, [])
            if places:
                shown = ", ".join(places[:5]) + (", ..." if len(places) > 5 else "")
                listed.append(f"{len(places)} {KINDS[kind][len(places) > 1]} ({shown})")
        return f"{self.source}: {'; '.join(listed)}"

    def refuse(self, cure: str) -> None:
        """Raise a `TaskError` that lists the faults and says ``cure``, if there are any."""
        if self.found:
            raise TaskError(f"{self}; {cure}")
