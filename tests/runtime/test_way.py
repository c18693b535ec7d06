"""How many files a prompt's way to its picture leads through, counted as it is walked."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 45
PACKAGES = {"engine", "runtime", "serving", "export", "training", "benchmarks", "latentrt"}
WALK = """
import json, sys, threading
from importlib import import_module

for room in ("latentrt.public", "runtime.__main__"):
    import_module(room)  # what importing runs is no part of the way
main, root, files = import_module(sys.argv[2]).main, sys.argv[1], {}

def note(frame, event, argument):
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    if event == "call" and function != "<module>" and file.startswith(root):
        files.setdefault(file[len(root) + 1:])

threading.setprofile(note)
sys.setprofile(note)
status = main(sys.argv[3:])
sys.setprofile(None)
print(json.dumps([status, [*files]]))
"""


def walked(command, folder):
    """Draw a prompt alone; return the files whose functions ran, in the order of their first."""
    asked = ["a red apple, fluent style", "--steps", "2"]
    words = [sys.executable, "-c", WALK, str(ROOT), command, *asked, "-o", folder / "apple.png"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    status, entered = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    return [file for file in entered if file.split("/")[0] in PACKAGES]


@pytest.mark.parametrize("command", ["runtime.__main__", "latentrt.__main__"])
def test_a_prompt_leads_through_few_files(command, tmp_path):
    """On the default path: a prompt alone, the model that ships, ONNX Runtime."""
    files = walked(command, tmp_path)
    assert {"runtime/pipeline.py", "engine/backends/onnxruntime/cpu.py"} <= set(files)
    assert len(files) <= MOST, files


def test_the_readme_names_them_in_the_order_of_the_way(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Follow a prompt")[1].split("\n## ")[0]
    named = re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)
    files = walked("runtime.__main__", tmp_path)
    assert len(named) >= 8
    assert set(named) <= set(files), "every file of the list is entered"
    assert sorted(named, key=files.index) == named
