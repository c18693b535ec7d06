"""A start: the engine's process first, and in neither process what a start does not need."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from serving.picture_request import PictureRequest
from tests.support.servers import models

ROOT = Path(__file__).parents[2]
LATER = {"fastapi", "uvicorn", "pydantic", "numpy", "PIL", "runtime.request", "serving.options"}
NOT_OF_HTTP = {"onnxruntime", "runtime.pipeline", "runtime.public", "serving.loop", "serving.child"}
NOT_OF_THE_ENGINE = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "asyncio"}
EVER = {"torch", "transformers", "diffusers", "onnx", "openvino", "scipy", "matplotlib", "httpx"}
AT_THE_START = """
import json, subprocess, sys
class Popen:
    def __init__(self, command, **options):
        print(json.dumps([list(command), sorted(sys.modules)]), flush=True)
        sys.exit()
subprocess.Popen = Popen
from latentrt.__main__ import main
main(["serve"])
"""
IN_HTTP = """
import json, sys
import latentrt.__main__, serving.__main__, serving.options, serving.supervisor, serving.server
print(json.dumps(sorted(sys.modules)))
"""
IN_THE_ENGINE = """
import json, sys
from serving.child import EngineSettings, runner
runner(EngineSettings(models={"pictogram": "pictogram"}, backend="cpu")).warm("pictogram")
print(json.dumps(sorted(sys.modules)))
"""


def told_by(code):
    """Return what a program prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_the_engine_is_started_before_the_server_imports_anything():
    command, modules = told_by(AT_THE_START)
    assert any("serving.child" in word for word in command)
    assert LATER.isdisjoint(modules)


def test_the_server_imports_nothing_that_draws():
    modules = told_by(IN_HTTP)
    assert {"fastapi", "runtime.request"} <= set(modules)
    assert (NOT_OF_HTTP | EVER).isdisjoint(modules)


def test_the_engine_imports_nothing_that_serves():
    modules = told_by(IN_THE_ENGINE)
    assert {"onnxruntime", "runtime.pipeline"} <= set(modules)
    assert (NOT_OF_THE_ENGINE | EVER).isdisjoint(modules)


def test_a_start_opens_what_draws_and_decodes_nothing():
    """The map of previews is fitted to a decoded picture once, for the first request of some."""
    runner = models()
    runner.warm("pictogram")
    ((pipeline, _),) = runner._open.values()
    assert set(pipeline.engines.opened) >= {"text_encoder", "step", "vae_decoder"}
    decoder, runs = pipeline.engine("vae_decoder"), []
    run = decoder.run
    decoder.run = lambda inputs: runs.append(1) or run(inputs)
    request = PictureRequest(
        fields={"prompt": "a", "num_inference_steps": 2, "seed": 1}, model="pictogram"
    )
    (picture,) = runner.unfinished_pictures(request)
    picture.enter()
    runner.step([picture])
    assert runs == []
    for _ in range(2):
        runner.unfinished_pictures(replace(request, preview_every=1))
        assert runs == [1]
    assert picture.preview()()[:3] == b"\xff\xd8\xff"
    assert runs == [1]
