"""How adapters name their tensors: `<prefix><module><part>`, in four dialects.

    kohya      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight
    original   lora_unet_input_blocks_1_1_proj_in.lora_down.weight        (kohya, for XL)
    diffusers  unet.down_blocks.0.attentions.0.proj_in.lora.down.weight
    PEFT       base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight

A kohya name has lost the difference between "." and "_". So all names are compared without it.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from engine.checkpoints.ldm_names import RESNET, UNET

__all__ = ["REFUSED", "TRAINING", "flat_name", "module_index", "split_name"]

# What stands before a module's name, and the component it means (None: the names themselves tell).
PREFIXES: Mapping[str, str | None] = MappingProxyType(
    {
        "base_model.model.": None,
        "lora_unet_": "unet",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te_": "text_encoder",
        "lora_unet.": "unet",
        "lora_te1.": "text_encoder",
        "lora_te2.": "text_encoder_2",
        "lora_te.": "text_encoder",
        "lycoris_": None,
        "_orig_mod_": None,  # of torch.compile, where names have no dots
        "unet.": "unet",
        "text_encoder.": "text_encoder",
        "text_encoder_2.": "text_encoder_2",
        "model.diffusion_model.": "unet",
        "diffusion_model.": "unet",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
    }
)

# What stands after it. PEFT puts the adapter's name, mostly "default", into the middle.
PART = re.compile(
    r"(?P<module>.+?)(?:"
    r"[._]lora(?:_linear_layer)?\.(?P<diffusers>up|down|mid)\.weight"
    r"|\.lora_(?P<kohya>up|down|mid)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.\w+)?\.weight"
    r"|\.lora_(?P<dora>magnitude_vector)(?:\.\w+){0,2}"
    r"|(?:[._]lora(?:_linear_layer)?)?\.(?P<alpha>alpha)"
    r"|\.(?P<plain>dora_scale|diff|diff_b|w_norm|b_norm)"
    r"|\.(?P<lycoris>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.\w+)?"
    r")",
    re.ASCII,
)
# What training programs put beside weights; nothing is drawn with it.
TRAINING = re.compile(
    r"(global_)?steps?|epochs?|(optimizer|lr_scheduler|scheduler)([._].*)?|(ema_)?decay|num_updates",
    re.ASCII,
)
MAX_NAME = 1000  # characters; real names have some 150
PEFT_PARTS = {"A": "down", "B": "up"}

# Old names of diffusers' attention, without dots.
RENAMED = (
    (re.compile(r"_self_attn_to_(q|k|v|out)$"), r"_self_attn_\1_proj"),
    (re.compile(r"_processor_to_"), "_to_"),
    (re.compile(r"_to_out$"), "_to_out_0"),
)

# Kinds of adapters that are not read, by a part of their tensors' names.
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        ".oft_": "OFT",
        ".a1.weight": "GLoRA",
        ".a2.weight": "GLoRA",
        ".b1.weight": "GLoRA",
        ".b2.weight": "GLoRA",
        ".on_input": "(IA)³",
        ".lora_embedding_": "LoRA of token embeddings",
        "lora_controlnet": "Control-LoRA",
        "dylora": "DyLoRA",
        ".boft_": "BOFT",
        ".vera_": "VeRA",
    }
)


def split_name(name: str) -> tuple[str | None, str, str] | None:
    """Split a tensor's name into component, module and part; None when it is no adapter's name.

    The part is one of `up`, `down`, `mid`, `alpha`, `norms` (DoRA's of PEFT), `dora_scale`
    (DoRA's of LyCORIS), `diff`, `diff_b`, `w_norm`, `b_norm`, `hada_…` and `lokr_…`.
    """
    match = PART.fullmatch(name) if len(name) <= MAX_NAME else None
    if match is None:
        return None
    groups = {key: value for key, value in match.groupdict().items() if value is not None}
    module = groups.pop("module")
    (dialect, part), *_ = groups.items()
    if dialect == "peft":
        part = PEFT_PARTS[part]
    elif dialect == "dora":
        part = "norms"
    component = None
    while prefix := next((prefix for prefix in PREFIXES if module.startswith(prefix)), None):
        module, component = module.removeprefix(prefix), PREFIXES[prefix] or component
    return (component, module, part) if module else None


def flat_name(module: str) -> str:
    """Write a module's name without dots, and in today's words."""
    name = module.replace(".", "_")
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def module_index(component: str, names: Iterable[str]) -> Mapping[str, str]:
    """Map all names that adapters may use for a component's modules to the module's own name.

    names: the component's weights, such as `conv_in.weight` and `conv_in.bias`
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    index = {flat_name(module): module for module in modules}
    if component == "unet":
        blocks = _original_blocks(modules)
        for module in modules:
            index.setdefault(flat_name(_original_name(module, blocks)), module)
    elif component.startswith("text_encoder"):
        for module in modules:
            index.setdefault(flat_name(module.removeprefix("text_model.")), module)
    return index


def _original_blocks(modules: Iterable[str]) -> Mapping[str, str]:
    """Number a UNet's blocks as the original implementation does, through all levels.

    modules: the UNet's; how many blocks a level has is seen in them
    """
    depths = (module.split(".") for module in modules)
    children = {".".join(parts[:4]) for parts in depths if parts[0].endswith("_blocks")}
    blocks = dict(UNET)
    for side, place, number in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        for level in range(len(children)):
            ours, attends = f"{side}_blocks.{level}", False
            for i in range(sum(child.startswith(f"{ours}.resnets.") for child in children)):
                attends = f"{ours}.attentions.{i}" in children
                blocks[f"{ours}.resnets.{i}"] = f"{place}.{number}.0"
                blocks[f"{ours}.attentions.{i}"] = f"{place}.{number}.1"
                number += 1
            if f"{ours}.downsamplers.0" in children:
                blocks[f"{ours}.downsamplers.0.conv"] = f"{place}.{number}.0.op"
                number += 1
            upsampler = f"{place}.{number - 1}.{2 if attends else 1}.conv"
            blocks[f"{ours}.upsamplers.0.conv"] = upsampler
    for i, ours in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        blocks[f"mid_block.{ours}"] = f"middle_block.{i}"
    return blocks


def _original_name(module: str, blocks: Mapping[str, str]) -> str:
    """Replace the block's name, and within a residual block the layer's."""
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        block, rest = ".".join(parts[:depth]), parts[depth:]
        if block in blocks:
            if ".resnets." in f".{block}." and rest:
                rest = [dict(RESNET).get(rest[0], rest[0]), *rest[1:]]
            return ".".join([blocks[block], *rest])
    return module
