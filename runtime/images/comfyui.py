"""Settings that ComfyUI leaves in a picture: the graph of nodes that drew it.

The graph is walked from a sampler's node along its links. Nodes that it knows are read; others are
named as left out.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from engine.errors import RequestError
from runtime.samplers import discarding, resolve

__all__ = ["parse_prompt_graph"]

Node = Mapping[str, Any]

SAMPLERS = ("KSampler", "KSamplerAdvanced")
# For which it makes one level more and leaves out the last but one (comfy/samplers.py).
LEAVES_ONE_OUT = ("dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2")
# What we call what others have under the same names.
OURS = {name: f"comfyui_{name}" for name in ("uni_pc", "uni_pc_bh2", "beta")}
_NUMBERS = {
    "seed": "seed",
    "noise_seed": "seed",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
}
_KNOWN = {
    *SAMPLERS,
    *("CLIPTextEncode", "EmptyLatentImage", "CheckpointLoaderSimple", "CheckpointLoader"),
    *("CLIPSetLastLayer", "VAEDecode", "VAEEncode", "VAELoader", "SaveImage", "PreviewImage"),
    *("LoadImage", "VAEDecodeTiled", "PrimitiveNode", "Reroute", "Note"),
}


def parse_prompt_graph(text: str) -> dict[str, Any]:
    """Read the settings of a graph's first sampler, {} for a text that is none.

    Square brackets are text in ComfyUI, so they are escaped. Its random numbers are torch's of the
    processor. Several samplers, and nodes that are not known, are in `left_out`.
    """
    graph = json.loads(text)
    nodes = {
        str(key): node
        for key, node in graph.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    samplers = [key for key, node in nodes.items() if node.get("class_type") in SAMPLERS]
    if not samplers:
        return {}
    inputs = nodes[samplers[0]]["inputs"]
    settings: dict[str, Any] = {"noise": "cpu", "clip_skip": 1}
    lost = dict[str, str]()
    for name, ours in _NUMBERS.items():
        value = _value(nodes, inputs.get(name))
        if isinstance(value, int | float) and not isinstance(value, bool):
            settings[ours] = value
    for name, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
        texts = [
            _value(nodes, node["inputs"].get("text"))
            for node in _upstream(nodes, inputs.get(name), "CLIPTextEncode")
        ]
        words = texts[0] if texts and isinstance(texts[0], str) else ""
        if not words and name in inputs and (not texts or texts[0] is None):
            lost[name] = "its text is not found"
        settings[ours] = words.replace("[", r"\[").replace("]", r"\]")
    _add_sampler(settings, inputs)
    _add_start(settings, nodes, inputs)
    _add_model(settings, nodes, inputs)
    left = lost | {
        f"node {key}": node["class_type"]
        for key, node in nodes.items()
        if str(node.get("class_type")) not in _KNOWN or key in samplers[1:]
    }
    return {**settings, "left_out": left} if left else settings


def _add_sampler(settings: dict[str, Any], inputs: Mapping[str, Any]) -> None:
    if isinstance(sampler := inputs.get("sampler_name"), str):
        scheduler = str(inputs.get("scheduler") or "normal")
        schedule: str | None = OURS.get(scheduler, scheduler)
        named = sampler.removesuffix("_gpu")
        sampler = OURS.get(named, named)
        with suppress(RequestError):
            sampler, schedule = resolve(sampler, schedule)
        if named in LEAVES_ONE_OUT:
            schedule = discarding(schedule)
        settings["sampler"], settings["schedule"] = sampler, schedule


def _add_start(
    settings: dict[str, Any], nodes: Mapping[str, Node], inputs: Mapping[str, Any]
) -> None:
    """Add the size of an empty start, or the picture to start from with the strength."""
    for node in _upstream(nodes, inputs.get("latent_image"), "EmptyLatentImage"):
        settings |= {name: node["inputs"].get(name) for name in ("width", "height")}
    for node in _upstream(nodes, inputs.get("latent_image"), "LoadImage"):
        settings |= {"image": node["inputs"].get("image"), "strength": inputs.get("denoise")}


def _add_model(
    settings: dict[str, Any], nodes: Mapping[str, Node], inputs: Mapping[str, Any]
) -> None:
    for node in _upstream(nodes, inputs.get("model"), "CheckpointLoader"):
        settings["model_name"] = str(node["inputs"].get("ckpt_name"))
    for node in _upstream(nodes, inputs.get("positive"), "CLIPSetLastLayer"):
        settings["clip_skip"] = -int(node["inputs"].get("stop_at_clip_layer", -1))


def _upstream(nodes: Mapping[str, Node], link: object, kind: str) -> Iterator[Node]:
    """Yield the nodes of a kind that a link comes from, the nearest first, each once."""
    waiting, seen = [link], set[str]()
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, list) or not link or str(link[0]) in seen:
            continue
        seen.add(key := str(link[0]))
        if (node := nodes.get(key)) is not None:
            if str(node.get("class_type")).startswith(kind):
                yield node
            waiting += node["inputs"].values()


def _value(nodes: Mapping[str, Node], value: object) -> object:
    """Return an input's own value, or the one of a primitive that it is linked to."""
    for _ in range(len(nodes)):
        if not isinstance(value, list) or not value:
            break
        given = list(nodes.get(str(value[0]), {"inputs": {}})["inputs"].values())
        value = given[0] if given else None
    return None if isinstance(value, list) else value
