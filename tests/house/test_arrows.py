"""The house stands: imports go one way, heavy packages stay in their rooms, an import is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("kernels", "blocks", "zoo", "configs", "tasks", "tools")
# Packages that only the named rooms may import.
RESTRICTED = {
    "mmengine": {"tasks"},
    "cv2": {"tasks"},
    "albumentations": {"tasks"},
    "torchmetrics": {"tasks"},
    "triton": {"kernels"},
}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the absolute module names a file imports, and whether the import runs when the file is imported."""
    package = ("foveate", *path.relative_to(ROOT).parent.parts)
    tree = ast.parse(path.read_text())
    inside_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *([node.module] if node.module else ())))
            names = [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [(name, node not in inside_functions) for name in names]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_never_run_up_the_house(room):
    above = ROOMS[ROOMS.index(room) + 1 :]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(room)
        for name, _ in imports(path)
        if name.split(".")[0] == "foveate" and len(name.split(".")) > 1 and name.split(".")[1] in above
    ]
    assert not wrong, wrong


def test_modules_with_an_underscore_are_imported_in_their_own_folder_alone():
    wrong = []
    for room in ROOMS:
        for path in sources(room):
            here = ("foveate", *path.relative_to(ROOT).parent.parts)
            for name, _ in imports(path):
                parts = tuple(name.split("."))
                private = next((place for place, part in enumerate(parts) if part.startswith("_")), None)
                if private is None or parts[0] != "foveate" or here[:private] == parts[:private]:
                    continue
                if ROOT.joinpath(*parts[1 : private + 1]).with_suffix(".py").is_file():
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_checkpoints_are_read_in_one_place():
    readers = {
        str(path.relative_to(ROOT).parent)
        for room in ROOMS
        for path in sources(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    }
    assert readers == {"zoo/checkpoint"}


# Of tasks/: what each wing may not import. Models need no data and no engine, data no engine.
WINGS = {
    "tasks/dense": ("tasks.data", "tasks.engine", *(f"tasks.{task}" for task in ("classify", "detect", "segment"))),
    "tasks/data": ("tasks.engine", *(f"tasks.{task}" for task in ("classify", "detect", "segment"))),
    "tasks/engine": tuple(f"tasks.{task}" for task in ("classify", "detect", "segment")),
}


@pytest.mark.parametrize("wing", WINGS)
def test_wings_of_the_tasks_stand_apart(wing):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(wing)
        for name, _ in imports(path)
        if name.removeprefix("foveate.").startswith(WINGS[wing])
    ]
    assert not wrong, wrong


def test_dense_models_need_torch_and_timm_alone():
    code = (
        "import sys, foveate.tasks.dense.detect, foveate.tasks.dense.segment; "
        "heavy = ('mmengine', 'cv2', 'albumentations', 'torchmetrics', 'matplotlib', 'pandas', 'faster_coco_eval'); "
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys() & {*heavy}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", RESTRICTED)
def test_heavy_packages_stay_in_their_rooms(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room in set(ROOMS) - RESTRICTED[package]
        for path in sources(room)
        for name, _ in imports(path)
        if name.split(".")[0] == package
    ]
    assert not wrong, wrong


def test_triton_is_imported_only_when_a_kernel_runs():
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources("kernels")
        for name, at_import in imports(path)
        if name.split(".")[0] == "triton" and at_import and not path.name.startswith("triton")
    ]
    assert not wrong, wrong


def test_no_room_without_a_name():
    nameless = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py"}
    assert not [path for room in ROOMS for path in sources(room) if path.name in nameless]


HEAVY = {"torch", "timm", "numpy", "mmengine", "triton", "cv2", "albumentations", "torchmetrics", "matplotlib"}


@pytest.mark.parametrize(
    "code",
    [
        "import foveate; foveate.__version__",
        *(
            f"from foveate.tools.cli import main; main({argv})"
            for argv in (
                *([], ["--help"], ["trian"], ["train"], ["train", "--help"], ["list", "--detektors"]),
                *(["bench", "--help"], ["weights", "--help"], ["weights", "verify", "--help"]),
            )
        ),
    ],
)
def test_what_needs_no_model_imports_no_torch(code):
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "imports",
    [
        "import foveate, timm",
        "import timm, foveate",
        "import foveate.blocks, timm",
        "import foveate.kernels, timm.layers, foveate.zoo.nat, timm",
        "from foveate.tasks.dense.detect import create_detector; import timm",
        "import foveate, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
)
def test_who_imports_the_package_and_timm_has_the_models(imports):
    code = f"{imports}; assert timm.is_model('nat_tiny') and timm.is_model('agent_swin_tiny')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_is_light():
    """The models load neither mmengine nor triton nor opencv."""
    code = (
        "import torch, timm, sys; before = set(sys.modules); import foveate; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert timm.is_model('nat_tiny'); "
        "print(' '.join(sorted(new & {'mmengine', 'triton', 'cv2', 'albumentations', 'torchmetrics', 'matplotlib'})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_family_is_named_among_the_tasks():
    families = {path.stem for path in (ROOT / "zoo").glob("*.py") if "default_cfgs" in path.read_text()}
    families |= {"dinat", "davit", "dat_pp"}
    wrong = [
        f"{path.relative_to(ROOT)}: {node.value!r}"
        for path in sources("tasks")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.rstrip("_") in families
    ]
    assert not wrong, wrong


def test_errors_are_matched_by_a_library_s_text_in_one_file():
    """Comparisons of str(error), or of a name for it, with words."""
    wrong = []
    for room in ROOMS:
        for path in sources(room):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
                    text = ast.unparse(node)
                    if "str(error)" in text and "str(path)" not in text and path.name != "library_errors.py":
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {text}")
    assert not wrong, wrong


def test_operators_are_defined_once_where_the_checkout_is_on_the_path_too():
    """transformers imports whatever is called `kernels`; in a program that starts here, that is this folder."""
    code = (
        "import torch, sys, foveate.kernels, kernels; x = torch.zeros(1, 7, 7, 1, 8); "
        "foveate.kernels.na2d(x, x, x, 3); "
        "twice = [name for name in sys.modules if name.startswith('kernels.')]; assert not twice, twice"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
