"""The command `latentrt`: subcommands, prompts, and strangers' files that bear our names."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from latentrt.__main__ import SUBCOMMANDS, main

ROOT = Path(__file__).parents[2]
DRAW = ["--steps", "1", "--threads", "1", "--backend", "cpu"]


@pytest.mark.parametrize("given", [[], ["--help"], ["-h"]])
def test_the_help_names_every_subcommand(given, capsys):
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in SUBCOMMANDS)
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_is_there_and_bears_its_name(name, capsys):
    assert callable(import_module(SUBCOMMANDS[name].module).main)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: latentrt {name} ")


@pytest.mark.skipif(os.name != "posix", reason="pipes that break with a signal's error")
@pytest.mark.parametrize("given", [[], ["info", "pictogram"], ["export", "info", "pictogram"]])
def test_a_reader_that_goes_away_hears_no_traceback(given):
    command = [sys.executable, "-m", "latentrt", *given]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 0


def test_an_error_without_a_place_to_say_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "nosuch"]) == 2


def test_a_prompt_needs_no_subcommand(tmp_path, capsys):
    short = ["-o", str(tmp_path / "a.png"), "-s", "7", "-n", "2", "-m", "pictogram"]
    long = ["--out", str(tmp_path / "b.png"), "--seed", "7", "--num-images", "2"]
    assert main(["a red apple", *DRAW, *short]) == 0
    assert main(["draw", "a red apple", *DRAW, *long, "--model", "pictogram"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [
        str(tmp_path / name) for name in ("a-1.png", "a-2.png", "b-1.png", "b-2.png")
    ]
    for number in (1, 2):
        a, b = (np.asarray(Image.open(tmp_path / f"{stem}-{number}.png")) for stem in "ab")
        np.testing.assert_array_equal(a, b)


def test_a_subcommand_may_be_a_prompt_after_draw(tmp_path):
    assert main(["draw", "info", *DRAW, "-o", str(tmp_path / "info.png")]) == 0
    assert (tmp_path / "info.png").is_file()


def test_options_may_come_first(tmp_path):
    assert main([*DRAW, "-o", str(tmp_path / "a.png"), "a hat"]) == 0


def test_a_misused_command_says_how_it_is_called(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["a", "--nothing"])
    assert ended.value.code == 2
    assert "`latentrt --help` lists" in capsys.readouterr().err


def test_export_keeps_its_own_subcommands(capsys):
    assert main(["export", "info", "pictogram"]) == 0
    assert "kind" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export", "cache", "--help"])
    assert capsys.readouterr().out.startswith("usage: latentrt export cache ")


@pytest.fixture
def foreign(tmp_path):
    """A folder of an app with its own modules of our names."""
    (tmp_path / "engine").mkdir()
    for name in ("engine/__init__.py", "export.py", "benchmarks.py"):
        (tmp_path / name).write_text("raise SystemExit('a stranger ran')")
    (tmp_path / "engine" / "__init__.py").write_text("")
    return tmp_path


def run(folder, *arguments, hidden=()):
    """Run Python in a folder where this project is installed, not the working folder.

    hidden: libraries that the process does not find
    """
    code = f"import sys; sys.path.append({str(ROOT)!r}); sys.modules |= dict.fromkeys({hidden})"
    site = folder.parent / f"site-{folder.name}"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_command_runs_the_installed_package_whatever_lies_in_the_folder(foreign):
    script = foreign.parent / "bin" / "latentrt"  # as an installer writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom latentrt.__main__ import main\nsys.exit(main())\n")
    (foreign / "runtime.py").write_text("raise SystemExit('a stranger ran')")
    done = run(foreign, str(script), "a hat", *DRAW, "-o", "hat.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (foreign / "hat.png").is_file()
    done = run(foreign, str(script), "export", "cache")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["latentrt", "export", "pictogram"], "export"),
        (["export", "graphs"], "export"),
        (["latentrt", "bench", "latency"], "bench"),
        (["training", "data"], "train"),
        (["latentrt", "serve", "--port", "0"], "serving"),
    ],
)
def test_a_missing_library_is_one_sentence_that_names_the_extra(tmp_path, command, extra):
    done = run(tmp_path, "-m", *command, hidden=("onnx", "torch", "uvicorn"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "is not installed; " in done.stderr
    assert f"`pip install '.[{extra}]'`" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["runtime", "latentrt", "runtime.calibration"])
def test_a_module_beside_a_strangers_engine_is_one_sentence(foreign, module):
    done = run(foreign, "-m", module, "a hat", *DRAW)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {foreign / 'engine' / '__init__.py'} is found in place")
    assert done.stderr.count("\n") == 1


def test_a_command_beside_a_strangers_module_is_one_sentence(foreign):
    (foreign / "engine" / "__init__.py").unlink()
    done = run(foreign, "-m", "latentrt", "export", "cache")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {foreign / 'export.py'} is found in place of ")
    assert done.stderr.count("\n") == 1
    (foreign / "runtime.py").write_text("raise SystemExit('a stranger ran')")
    done = run(foreign, "-m", "latentrt", "a hat", *DRAW)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {foreign / 'runtime.py'} is found in place of Latentrt's"
    )
    assert done.stderr.count("\n") == 1


def test_an_app_with_a_module_of_an_unused_name_is_not_told(foreign):
    (foreign / "engine" / "__init__.py").unlink()
    done = run(foreign, "-c", "from latentrt import Request")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_app_beside_a_strangers_engine_is_told_by_an_error_of_imports(foreign):
    done = run(foreign, "-c", "import runtime")
    assert done.returncode == 1
    assert "ImportError: " in done.stderr.splitlines()[-1]
    assert "engine" in done.stderr.splitlines()[-1]


def test_a_folder_without_code_does_no_harm(foreign):
    (foreign / "engine" / "__init__.py").unlink()
    done = run(foreign, "-m", "runtime", "a hat", *DRAW, "-o", "hat.png")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("package", ["runtime", "export"])
def test_a_package_looks_whose_engine_it_has(package, monkeypatch, capsys):
    """The same in this process: what an import raises, and what `python -m` prints."""
    stranger = SimpleNamespace(__file__="/app/engine/__init__.py")
    monkeypatch.setitem(sys.modules, "engine", stranger)
    path = ROOT / package / "__init__.py"
    code = compile(path.read_text(), str(path), "exec")
    with pytest.raises(ImportError, match=r"^/app/engine/__init__\.py is found in place"):
        exec(code, {"__file__": str(path)})
    monkeypatch.setattr(sys, "argv", ["-m"])
    with pytest.raises(SystemExit) as ended:
        exec(code, {"__file__": str(path)})
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: /app/engine/__init__.py is found in place")
