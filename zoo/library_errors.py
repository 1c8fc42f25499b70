"""What errors of Python, torch and timm are about: told by their text, for want of types of their own.

Nowhere else is an error matched by a library's words, so that a new version is answered here alone.
"""

import re


def unknown_option(error: TypeError) -> str | None:
    """Return the keyword that a function was called with but doesn't have; None if the error is another."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return match and match[1]


def call_fault(error: TypeError) -> str:
    """Return what is wrong with a call, without the function's own name."""
    return str(error).split("() ")[-1]


def first_line(error: BaseException) -> str:
    """Return an error's first line, or what kind it is if it says nothing."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def unknown_picture(error: BaseException) -> str | None:
    """Return that a picture is of no known format, where Pillow names an address in memory; None of other errors."""
    return "of no known format" if "BytesIO object" in str(error) else None


def cause_of(error: BaseException) -> str:
    """Return the first line of the first error in a chain: the later ones only say where it happened."""
    return _first_line(error)[:300]


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next((line.strip() for line in plain.splitlines() if line.strip()), type(error).__name__)


def run_fault(error: BaseException) -> str:
    """Return what onnxruntime says of a file that it can't run, without where in its own source it was said."""
    cause = _first_line(error)
    where = r"(?:/\S+ (?:(?:\w+ )?[\w:~<>]+\([^)]*\)|\S+) )?"
    node = re.search(rf"while running (\w+) node\. Name:'([^']*)' Status Message: {where}(.*)", cause)
    return f"{node[1]} ({node[2]}): {node[3][:160]}" if node else cause[:300]


def untranslated(error: BaseException | None) -> str | None:
    """Return which operator torch.onnx has no translation of, or can't simplify; None if the error is another."""
    while error is not None:
        if named := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", str(error)):
            return f"ONNX has no {named[1]}"
        if named := re.search(r"Error during constant folding for node '[^']*' \(\w*::(\w+)\)", str(error)):
            return f"onnxscript fails on {named[1]}: {cause_of(error)}"
        error = error.__cause__
    return None


def fixed_size(error: BaseException) -> str | None:
    """Return what torch.export says of a size that was to be any and that the model's code makes a constant."""
    text = ""
    while error is not None:
        text, error = f"{text} {error}", error.__cause__
    text = " ".join(text.split())
    constant = re.search(r"(?:inferred to be a constant|specialized (?:it )?to be a constant) \((\d+)\)", text)
    divisible = re.search(r"(?:Eq|Ne)\((Mod\([^)]*\)[^)]*), 0\)", text)
    if constant:
        return f"its code makes a side, or a product of sides, the constant {constant[1]}"
    return f"its code asks whether a side is a multiple of a number ({divisible[1]})" if divisible else None


def load_fault(error: BaseException) -> str:
    """Return why a state dict could not be loaded: torch's message has a headline of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[min(1, len(lines) - 1)]


def needs_unpickling(error: Exception) -> bool:
    """Return whether a file was refused since it pickles objects, which could run code."""
    text = str(error).lower()
    if "unsupported operand" in text:  # what is no pickle at all
        return False
    return any(words in text for words in ("weights_only", "unsupported global", "unsupported class"))


def lacks_variance(error: ValueError) -> bool:
    """Return whether a batch norm was given one value per channel to train on."""
    return "more than 1 value per channel" in str(error)


def needs_values(error: Exception) -> bool:
    """Return whether something was computed on tensors without values that needs them."""
    return "meta tensors" in str(error)
