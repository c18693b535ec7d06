"""How many files a prompt's way to its picture leads through, counted as it is walked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST = 35
PACKAGES = {"engine", "runtime", "export", "training", "benchmarks", "latentrt"}
WALK = """
import json, sys, threading
from importlib import import_module

main, root, files = import_module(sys.argv[2]).main, sys.argv[1], set()

def note(frame, event, argument):
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    if event == "call" and function != "<module>" and file.startswith(root):
        files.add(file[len(root) + 1:])

threading.setprofile(note)
sys.setprofile(note)
status = main(sys.argv[3:])
sys.setprofile(None)
print(json.dumps([status, sorted(files)]))
"""


@pytest.mark.parametrize("command", ["runtime.__main__", "latentrt.__main__"])
def test_a_prompt_leads_through_few_files(command, tmp_path):
    """On the default path: a prompt alone, the model that ships, ONNX Runtime."""
    asked = ["a red apple, fluent style", "--steps", "2"]
    walked = [sys.executable, "-c", WALK, str(ROOT), command, *asked, "-o", tmp_path / "apple.png"]
    done = subprocess.run(walked, cwd=ROOT, capture_output=True, text=True, check=True)
    status, walked = json.loads(done.stdout.splitlines()[-1])
    files = [file for file in walked if file.split("/")[0] in PACKAGES]
    assert status == 0
    assert {"runtime/pipeline.py", "engine/backends/onnxruntime/cpu.py"} <= set(files)
    assert len(files) <= MOST, files
