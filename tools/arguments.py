"""Types of the commands' arguments."""

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number from ``least`` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, at least {least}; got {text}")
        return value

    return number


def image_size(text: str) -> tuple[int, int]:
    """Read a size in pixels, ``SIDE`` or ``HEIGHTxWIDTH``, as argparse's types do."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be a side or HEIGHTxWIDTH in pixels; got {text}")
    return int(sides[0]), int(sides[-1])
