"""Functions, their signatures and files stay of a size that is read at once."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "blocks", "zoo", "configs", "tasks", "tools")
PARAMETERS, FUNCTIONS_WITH_MORE = 10, 25
LINES_OF_FUNCTIONS, LINES_OF_FILES = 60, 700
# Signatures that others have written.
NATTENS = ("blocks/natten/", "kernels/neighborhood/api.py")
REASONS = {
    "blocks/natten/names.py table": "a table, a row a name",
    "kernels/neighborhood/triton_kernels.py backward_query_kernel": "a kernel: what is in registers isn't handed on",
    "tasks/dense/segment/segmenter.py create_segmenter": "a head after the other, each with its own parts",
}
FILES: dict[str, str] = {"configs/training.py": "a table, a rule a row"}


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@functools.cache
def functions() -> list[tuple[str, list[ast.ClassDef], ast.FunctionDef]]:
    """Return of each function its file, the classes around it, and itself."""

    def walk(node: ast.AST, classes: list[ast.ClassDef]) -> Iterator[tuple[list[ast.ClassDef], ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield classes, child
            yield from walk(child, [*classes, child] if isinstance(child, ast.ClassDef) else classes)

    return [
        (str(path.relative_to(ROOT)), classes, function)
        for path in sources()
        for classes, function in walk(ast.parse(path.read_text()), [])
    ]


def parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"])) + bool(arguments.vararg) + bool(arguments.kwarg)


def is_others(file: str, classes: list[ast.ClassDef], function: ast.FunctionDef) -> bool:
    """Return whether somebody else says what a function takes."""
    decorators = " ".join(map(ast.unparse, function.decorator_list))
    bases = {ast.unparse(base) for owner in classes for base in owner.bases}
    return (
        "triton.jit" in decorators  # pointers, strides and constants, one by one
        or "custom_op" in decorators  # torch's schemas are flat
        or file.startswith(NATTENS)
        or (function.name == "__init__" and "Pyramid" in bases)  # timm hands a model's options on by keyword
    )


def test_few_functions_take_many_things():
    many = [
        f"{file}:{function.lineno} {'.'.join([*(owner.name for owner in classes), function.name])}: {count}"
        for file, classes, function in functions()
        if (count := parameters(function)) >= PARAMETERS and not is_others(file, classes, function)
    ]
    assert len(many) <= FUNCTIONS_WITH_MORE, many


def lines(function: ast.FunctionDef) -> int:
    """Return how many lines a function has after its signature and its docstring."""
    described = ast.get_docstring(function) is not None
    body = function.body[1:] if described else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_long_functions_have_a_reason():
    long = {f"{file} {function.name}" for file, _, function in functions() if lines(function) > LINES_OF_FUNCTIONS}
    assert long == REASONS.keys()


def test_long_files_hold_one_idea():
    long = {str(path.relative_to(ROOT)) for path in sources() if len(path.read_text().splitlines()) > LINES_OF_FILES}
    assert long == FILES.keys()
