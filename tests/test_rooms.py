"""The house as it is drawn: which room may import which, no circles, no file too long.

The rooms are written from the ground up; a room may import those below it and never one above.
Imports count wherever they stand, within functions and under TYPE_CHECKING too, and so do the
modules that a registry names in a text.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "runtime", "serving", "export", "training", "benchmarks", "latentrt")
ROOMS = {
    "": ("engine", "runtime", "serving", "export", "training", "benchmarks", "latentrt"),
    "engine": (
        *(
            "errors",
            "deferred",
            "command_line",
            "store",
            "shipped",
            "configs",
            "graphs",
            "checkpoints",
        ),
        *("model", "adapters", "devices", "backends", "engines"),
        "steering",
    ),
    "engine.backends": (
        *("settings", "base", "binding", "memory_estimate"),
        *("onnxruntime", "openvino", "tensorrt", "registry", "self_test"),
    ),
    "engine.checkpoints": (
        *("formats", "component", "ldm_names", "architecture", "tiny_autoencoder", "parts"),
        *("families", "few_steps", "likeness", "pipeline_index", "unsupported", "prediction"),
        *("gpt2", "single_file", "diffusers_unet", "pieces", "control_lora", "control_net"),
        *("upscaler", "image_encoder", "safety_checker", "ip_adapter", "t2i_adapter"),
    ),
    "runtime": (
        *("checks", "philox", "noise", "samplers", "presets", "conditioning", "images"),
        *("preprocessors", "control", "control_types", "image_prompt", "regions", "request"),
        "picture_settings",
        *("request_options", "framing", "editing", "step_inputs", "variants", "plan", "templates"),
        *("denoising", "steering", "adapted_model", "diffusers_arguments", "result", "pipeline"),
        *("calibration", "expansion", "axes", "control_options", "image_prompt_options"),
        *("steering_options", "output_options", "text_options", "drawing_options"),
        *("image_options", "options", "terminal", "backend_note", "found_settings"),
        *("upscaler_folder", "again"),
        *("watched_steps", "finishing", "upscale", "grid", "batch", "preprocess", "public"),
        "__main__",
    ),
    "serving": (
        *(
            "errors",
            "limits",
            "memory",
            "uploads",
            "masking",
            "steering",
            "picture_request",
            "enlarging_request",
            "events",
            "event_inbox",
            "fair_queue",
            "bucket_scheduler",
            "row_limits",
            "model_errors",
            "model_files",
            "engine_settings",
            "model_memory",
            "checks",
            "unfinished_picture",
            "enlarging_picture",
            "model_runner",
            "order",
            "loop",
        ),
        *("client", "admission", "metrics", "jobs", "addresses", "keys", "names", "http"),
        *(
            "frames",
            "engine_process",
            "child",
            "supervisor",
            "engine_group",
            "configuration",
            "operator_files",
            "options",
            "server",
            "ray",
            "__main__",
        ),
    ),
}
SEPARATE = {("export", "runtime"), ("runtime", "export")}  # only files cross between them
MAX_ROOMS, MAX_LINES = 14, 350


@cache
def modules():
    """Return the file of every module of the project."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def named(path, module):
    """Yield what a file imports, as dotted names; a name may be a module or something in one."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*(parts if node.level else ()), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and "." in str(node.value):
            yield from {node.value} & modules().keys()  # a registry's


@cache
def imports():
    """Return the modules of the project that each of its modules imports."""
    known = modules()
    found = {}
    for module, path in known.items():
        names = (name if name in known else name.rpartition(".")[0] for name in named(path, module))
        found[module] = {name for name in names if name in known and name != module}
    return found


def circles(graph):
    """Return the sets of nodes that reach each other, by Tarjan's algorithm."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = set()
            while node not in group:
                group.add(stack.pop())
            found.append(group)

    for node in graph:
        if node not in index:
            visit(node)
    return [sorted(group) for group in found if len(group) > 1]


def test_the_graph_is_read():
    assert len(modules()) > 150
    assert "engine.backends.onnxruntime.cpu" in imports()["engine.backends.registry"]
    found = imports()["engine.backends.memory_estimate"]
    assert "engine.devices.cuda" in found, "within a function"
    assert "runtime.plan" in imports()["runtime.pipeline"]
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]]


def test_no_file_is_in_a_circle():
    assert circles(imports()) == []


@pytest.mark.parametrize("place", PACKAGES)
def test_no_folder_is_in_a_circle(place):
    """Seen from the folder above, a folder is one room."""
    folders = {m for m, path in modules().items() if path.name == "__init__.py"}
    for folder in sorted(f for f in folders if f.split(".")[0] == place):
        graph = {}
        for module, used in imports().items():
            if here := room(module, f"{folder}."):
                graph.setdefault(here, set()).update(room(other, f"{folder}.") for other in used)
                graph[here] -= {here, None}
        assert circles(graph) == [], folder


def room(module, prefix):
    """Return the room of a folder that a module is in; None where it is not in the folder."""
    return module.removeprefix(prefix).split(".")[0] if module.startswith(prefix) else None


@pytest.mark.parametrize("house", ROOMS)
def test_no_import_leads_upwards(house):
    prefix = f"{house}." if house else ""
    floors = {name: floor for floor, name in enumerate(ROOMS[house])}
    assert {room(m, prefix) for m in modules()} - {None} == set(floors), "every room has its place"
    upwards = {
        (module, other)
        for module, used in imports().items()
        for other in used
        if module.startswith(prefix)
        and other.startswith(prefix)
        and floors[room(module, prefix)] < floors[room(other, prefix)]
    }
    assert upwards == set()


def test_export_and_runtime_do_not_know_each_other():
    packages = {(m, other) for m, used in imports().items() for other in used}
    assert not {(m.split(".")[0], other.split(".")[0]) for m, other in packages} & SEPARATE


def test_the_engine_has_few_rooms():
    rooms = {module.split(".")[1] for module in modules() if module.startswith("engine.")}
    assert 8 <= len(rooms) <= MAX_ROOMS


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_too_long(package):
    lengths = {p: len(p.read_text().splitlines()) for p in (ROOT / package).rglob("*.py")}
    assert {p.name: n for p, n in lengths.items() if n > MAX_LINES} == {}
