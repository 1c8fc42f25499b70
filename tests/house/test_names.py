"""Variables, parameters and attributes say what they hold, not where it has been."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (".ci", "kernels", "blocks", "zoo", "configs", "tasks", "tools")
VAGUE = {"found", "chosen", "wanted", "ours", "held", "kept"}


def vague_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of whatever is bound to one of the vague names."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.MatchAs(name=name) | ast.MatchStar(name=name) | ast.MatchMapping(rest=name):
                pass
            case ast.ExceptHandler(name=name) | ast.alias(asname=name):
                pass
            case _:
                continue
        if name in VAGUE:
            yield node.lineno, name


def test_names_say_what_they_hold():
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(paths) > 200
    vague = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in paths
        for line, name in vague_names(ast.parse(path.read_text()))
    ]
    assert not vague, vague


def test_every_binding_is_looked_at():
    source = """
found = 1
chosen: int = 2
(wanted, [*ours]) = 3
kept += 4
self.held = 5
for found in held: pass
[kept for kept in found]
if (chosen := 6): pass
with open(wanted) as ours: pass
def f(held, *kept, found=7, **chosen): pass
lambda wanted: ours
print(found, held.kept, wanted=8)
"""
    bound = [
        *((2, "found"), (3, "chosen"), (4, "wanted"), (4, "ours"), (5, "kept"), (6, "held"), (7, "found"), (8, "kept")),
        *((9, "chosen"), (10, "ours"), (11, "held"), (11, "kept"), (11, "found"), (11, "chosen"), (12, "wanted")),
    ]
    assert sorted(vague_names(ast.parse(source))) == sorted(bound)
