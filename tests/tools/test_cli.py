import argparse
import ast
import fnmatch
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import foveate
import pytest
from foveate.configs import list_recipes, read_recipe
from foveate.tasks import engine
from foveate.tools import cli
from foveate.tools.arguments import at_least
from foveate.tools.cli import main

TOOLS = Path(cli.__file__).parent


def examples() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in cli.EXAMPLES.splitlines()[1:]]


def test_without_a_command_it_says_what_there_is(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert len(examples()) == 6


def test_every_command_says_how_it_is_used(capsys):
    for name in cli.COMMANDS:
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: foveate {name}")


def options(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options(sub)
        else:
            yield action


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_states_every_default(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"foveate.tools.{name}").add_arguments(parser)
    for action in options(parser):
        given = action.default not in (None, False, argparse.SUPPRESS) and action.option_strings
        if given and "by default" not in (action.help or ""):
            pytest.fail(f"{name} {action.option_strings[0]}: the help does not state the default, {action.default!r}")


# Any number may be a seed or a class; the ranges of the others depend on what they are for.
OTHER_NUMBERS = {"--seed", "--class", "--white", "--count", "--same", "--animate"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_counts_and_sizes_are_refused_by_one_type(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"foveate.tools.{name}").add_arguments(parser)
    assert {action.option_strings[0] for action in options(parser) if action.type is int} <= OTHER_NUMBERS


@pytest.mark.parametrize(("least", "text"), [(1, "0"), (1, "-3"), (1, "2.5"), (1, "many"), (0, "-1")])
def test_counts_and_sizes_have_a_least_value(least, text):
    assert at_least(least)(str(least)) == least
    with pytest.raises(argparse.ArgumentTypeError, match=f"a whole number, at least {least}; got {text}"):
        at_least(least)(text)


def test_a_size_that_is_too_small_is_one_line(refused):
    message = refused("info", "nat_atto", "--size", "0")
    assert "argument --size: must be a whole number, at least 1; got 0; see `foveate info --help`" in message


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"foveate \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train"], "arguments are required: CONFIG"),
        (["train", "classify/nat_ato_digits"], "did you mean 'classify/nat_atto_digits'?"),
        (["train", "classify/nat_atto_digits", "optimizer.rl=1"], "did you mean 'optimizer.lr'?"),
        (["train", "classify/nat_atto_digits", "model.name=nat_tinny"], "did you mean 'nat_tiny'?"),
        (["train", "classify/nat_atto_digits", "--outptu", "x"], "unrecognized arguments: --outptu"),
        (["eval", "classify/nat_atto_digits", "absent.pth"], "absent.pth: no such file"),
        (["predict", "absent.png", "--checkpoint", "x.pth"], "absent.png: no such file or folder"),
        (["predict", "absent.png"], "one of the arguments --checkpoint --model is required"),
        (["info", "nat_tinny"], "did you mean 'nat_tiny'?"),
        (["list", "zzz"], "no model matches 'zzz'"),
    ],
)
def test_a_wrong_request_is_answered_in_one_line(refused, tmp_path, monkeypatch, argv, reason):
    monkeypatch.chdir(tmp_path)
    assert reason in refused(*argv)


def test_the_printed_config_is_a_config_that_gives_itself(capsys, tmp_path):
    assert main(["train", "classify/nat_atto_digits", "seed=3", "--print-config"]) == 0
    path = tmp_path / "mine.py"
    path.write_text(capsys.readouterr().out)
    config = engine.load_config(path)
    assert config["seed"] == 3
    assert main(["train", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == path.read_text()


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_loads_and_states_command_number_and_cost(name):
    config = engine.load_config(name)
    model = config["model"]
    # Of a detector that has several forms, the form is named too.
    form = "(5scale_|improved_)?"
    described = model["name"] if config["task"] == "classify" else f"{model['head']}_{form}{model['backbone']}"
    described = described.partition(".")[0].removeprefix("foveate_")
    if not name.endswith("/finetune"):  # for any model
        assert re.match(f"{described}_", name.partition("/")[2])
    docstring = ast.get_docstring(ast.parse(read_recipe(name)))
    assert all(len(line) <= 120 for line in docstring.splitlines()[1:])
    assert f"foveate train {name}" in docstring
    assert all(f"\n{heading}:" in docstring for heading in ("Command", "Expect", "Cost"))


def test_training_on_the_digits_learns_them(digits_run):
    history = json.loads((digits_run / "history.json").read_text())
    assert history[-1]["val/accuracy"] >= 0.88
    assert (digits_run / "curves.png").stat().st_size > 10_000


def test_evaluation_reproduces_the_number_of_training(digits_run, capsys, tmp_path):
    argv = ["eval", str(digits_run / "config.py"), str(digits_run / "last.pth"), "--json", str(tmp_path / "m.json")]
    assert main(argv) == 0
    history = json.loads((digits_run / "history.json").read_text())
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["accuracy"] == history[-1]["val/accuracy"]
    assert f"{metrics['accuracy']:.4f}" in capsys.readouterr().out


def test_a_checkpoint_alone_is_measured_as_it_says_and_runs_nothing(digits_run, capsys, refused, monkeypatch):
    monkeypatch.setattr("mmengine.config.Config.fromfile", lambda *_, **__: pytest.fail("Python is run"))
    assert main(["eval", str(digits_run / "last.pth"), "batch_size=397"]) == 0
    accuracy = json.loads((digits_run / "history.json").read_text())[-1]["val/accuracy"]
    assert f"accuracy       {accuracy:.4f}" in capsys.readouterr().out
    assert "CHECKPOINT is required" in refused("eval", "classify/nat_atto_digits")


def test_a_checkpoint_of_another_model_is_refused(digits_run, refused):
    message = refused("eval", "classify/nat_atto_digits", str(digits_run / "last.pth"), "model.name=nat_mini")
    assert "its model is nat_atto, but the config's is nat_mini" in message


def test_the_list_shows_our_models_with_their_parameters(capsys):
    assert main(["list", "nat_[am]*"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["nat_atto", "nat_mini"]
    assert rows[2][1] == "19.98"
    for name, told in (
        ("agent_deit_tiny", "by hand: https://github.com/LeapLabTHU/Agent-Attention"),
        ("biformer_tiny", "dead"),
        ("nat_atto", "foveate_digits"),
        ("foveate_host_atto", "none"),
        ("nat_mini", "shi_in1k"),
    ):
        assert main(["list", name]) == 0
        assert capsys.readouterr().out.rstrip().endswith(f"  {told}")
    assert main(["list", "resnet18", "--timm"]) == 0
    assert "resnet18" in capsys.readouterr().out.splitlines()


def test_the_list_of_all_is_a_line_a_family(capsys):
    assert main(["list"]) == 0
    head, *rows, _, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["models", "what", "they", "are"]
    starts = [word for row in rows for word in row.split("  ")[0].split()]
    assert {"nat_*", "dinat_*", "foveate_davit_*", "foveate_host_*"} <= set(starts)
    for name in foveate.list_models():
        assert sum(fnmatch.fnmatchcase(name, start) for start in starts) == 1
    assert sum(int(re.search(r"  (\d+) +", row)[1]) for row in rows) == len(foveate.list_models())
    assert last.startswith(f"{len(foveate.list_models())} models")


def test_info_counts_the_operator_and_states_source_and_license(capsys):
    assert main(["info", "nat_mini"]) == 0
    text = capsys.readouterr().out
    assert "19.98 M" in text
    # The paper states 2.7 GMACs; tiles compute some scores that the window hides.
    assert 2.6 <= float(re.search(r"([\d.]+) GMACs at 224x224", text)[1]) <= 3.2
    assert "license mit" in text
    assert "top-1 81.8 (authors)" in text
    assert main(["info", "nat_atto", "--size", "64"]) == 0
    text = capsys.readouterr().out
    assert "at 64x64" in text
    assert "foveate train classify/nat_atto_digits" in text


WITHOUT_LIBGL = """
import sys
from foveate.tools.cli import main
print(main(["info", "nat_atto"]), main(["predict", *sys.argv[1:]]), main(["train", "classify/nat_atto_digits"]))
"""


def test_without_libgl_commands_work_or_name_the_cure(digits_run, tmp_path):
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    (tmp_path / "image.png").write_bytes((TOOLS.parent / "tasks/data/samples/nuclei_image.png").read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBGL, "image.png", "--checkpoint", str(digits_run / "best.pth")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "0 0 2", done.stdout + done.stderr
    assert done.stderr.splitlines() == [
        "foveate: error: OpenCV can't be imported (libGL.so.1: cannot open shared object file: No such file or "
        "directory); cure: pip install --force-reinstall --no-deps opencv-python-headless"
    ]


def test_the_package_runs_as_a_module(tmp_path):
    argv = [sys.executable, "-m", "foveate", "list", "nat_atto"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nat_atto" in done.stdout


@pytest.mark.parametrize(
    ("before", "load", "set_by_user", "expected"),
    [
        ("", 0, {}, "PASSIVE 3000"),
        ("import sys\nsys.argv[1:] = ['bench', '-h']", 0, {}, "None None"),
        ("", 9999, {}, "PASSIVE None"),
        ("", 0, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ("", 0, {"GOMP_SPINCOUNT": "7"}, "None 7"),
        ("import torch", 0, {}, "None None"),
    ],
    ids=["quiet", "bench", "busy", "policy", "count", "library"],
)
def test_threads_spin_little_unless_the_user_or_the_program_decides(before, load, set_by_user, expected):
    code = (
        f"{before}\nimport os\nos.getloadavg = lambda: ({load}, 0, 0)\nfrom foveate.tools.cli import main\n"
        "import contextlib\nwith contextlib.suppress(SystemExit): main()\n"
        "print(*map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | set_by_user, check=True
    )
    assert run.stdout.splitlines()[-1] == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.parametrize(
    ("first", "set_by_user", "stays"),
    [([], {}, True), (["bench", "-h"], {}, False), ([], {"MALLOC_TRIM_THRESHOLD_": "100000000"}, False)],
    ids=["command", "bench", "user"],
)
def test_commands_keep_freed_memory_unless_the_user_decides(first, set_by_user, stays):
    code = (
        f"import sys\nsys.argv[1:] = {first}\nfrom foveate.tools.cli import main\n"
        "import contextlib, resource\nwith contextlib.suppress(SystemExit): main()\n"
        "def step(): [bytearray(20 << 20) for _ in range(8)]\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "step(); step(); before = faults(); step(); print(faults() - before)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | set_by_user, check=True
    )
    assert (int(run.stdout.splitlines()[-1]) < 1000) == stays


@pytest.mark.heavy
def test_the_examples_of_the_usage_work_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in examples():
        assert main(argv) == 0, capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "foveate", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_warning_of_ours_is_one_line_and_others_are_python_s(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert main(["--version"]) == 0
    ours = warnings.formatwarning("1 damaged\nfile; left out", UserWarning, cli.__file__, 1)
    assert ours == "foveate: note: 1 damaged file; left out\n"
    assert "elsewhere.py:7: UserWarning: text" in warnings.formatwarning("text", UserWarning, "/elsewhere.py", 7)
