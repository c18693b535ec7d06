"""What parts that pictures steer take beside the inputs of a step: residuals, keys and values.

All of it is float32. Symbols beside those of `engine.graphs.graph`: k pictures that are attended to
one by one, t tokens of each; K types of pictures that a union of ControlNets tells apart, Y the
width of the embedded timestep.
"""

from collections.abc import Mapping
from types import MappingProxyType

from engine.configs.base import Config

__all__ = [
    "CONTROLLED_LEVELS",
    "IP_BY_GROUPS",
    "IP_PARTS",
    "MAX_FEATURES",
    "MAX_LEVELS",
    "STEERED",
    "feature_names",
    "ip_weights",
    "residual_inputs",
    "residual_names",
    "sides_of",
    "steering_shapes",
]

Shapes = dict[str, tuple[str | int, ...]]

# What a union of ControlNets makes of the type of its picture: added to the time embedding.
TYPE_EMBEDDING: Shapes = {"type_embedding": ("B", "Y")}

MAX_LEVELS = 4  # of a UNet that have residuals or masks among a part's inputs
MAX_FEATURES = MAX_LEVELS + 1  # of T2I-Adapters: one a level, and the middle's
# Of the parts that pictures steer: how many levels have residuals.
CONTROLLED_LEVELS: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("step_controlled", "step_controlled_ip", "control"), MAX_LEVELS),
        **dict.fromkeys(("step_shallow_controlled", "step_shallow_controlled_ip"), 1),
        **dict.fromkeys(("step_ip", "step_shallow_ip", "feature_sum"), 0),
    }
)
IP_PARTS = frozenset(part for part in CONTROLLED_LEVELS if part.endswith("_ip"))
# Parts that take or give more than `engine.graphs.graph` lists.
STEERED = frozenset((*CONTROLLED_LEVELS, "control_hint", "t2i_adapter"))
IP_BY_GROUPS = tuple(f"ip_weights_{level}" for level in range(MAX_LEVELS))


def steering_shapes(part: str, config: Config) -> tuple[Shapes, Shapes]:
    """Return what one of `STEERED` takes and gives beside what is listed, shapes by name."""
    return _inputs(part, config), _outputs(part, config)


def _inputs(part: str, config: Config) -> Shapes:
    """Return what is taken; the sum of T2I-Adapters' features takes one's, and the sum so far."""
    if part == "feature_sum":
        own, summed = _features(config, "B"), _features(config, "g", "B")
        return {**{f"own_{name}": shape for name, shape in own.items()}, **summed}
    return {
        **_type_inputs(part, config),
        **residual_inputs(part, config),
        **(_ip_inputs(config) if part in IP_PARTS else {}),
    }


def _outputs(part: str, config: Config) -> Shapes:
    """Return what a ControlNet or a T2I-Adapter gives."""
    if part == "control":
        return {f"next_{name}": shape for name, shape in residual_inputs(part, config).items()}
    if part == "feature_sum":
        return {f"next_{name}": shape for name, shape in _features(config, "g", "B").items()}
    if part == "control_hint" and config.control_types:
        return TYPE_EMBEDDING
    return _features(config, 1) if part == "t2i_adapter" else {}


def feature_names(count: int) -> list[str]:
    """Return what features of T2I-Adapters are called, a step's inputs and their outputs."""
    return [f"features_{place}" for place in range(count)]


def _features(config: Config, *rows: str | int) -> Shapes:
    features = config.features()
    return {
        name: (*rows, width, *sides_of(level))
        for name, (width, level) in zip(feature_names(len(features)), features, strict=True)
    }


def residual_names(config: Config) -> list[str]:
    """Return what the residuals of every level are called, as inputs of a controlled step."""
    return [f"residuals_{level}" for level in range(len(config.residual_widths()))]


def residual_inputs(part: str, config: Config) -> Shapes:
    """What ControlNets add to a UNet's maps: (g, B, C, h, w) a level; a shallow step has the first.

    C counts all maps of the level, channels behind channels.
    """
    levels = config.residual_widths()[: CONTROLLED_LEVELS.get(part, 0)]
    return {
        f"residuals_{level}": ("g", "B", sum(widths), *sides_of(level))
        for level, widths in enumerate(levels)
    }


def _type_inputs(part: str, config: Config) -> Shapes:
    """What a union of ControlNets is told of its picture: the type, 1 in its place and else 0.

    At a call it is what `control_hint` made of that.
    """
    types: Shapes = {"control_types": ("B", "K")}
    told = {"control_hint": types, "control": TYPE_EMBEDDING}
    return told.get(part, {}) if config.control_types else {}


def ip_weights(config: Config) -> dict[int, str]:
    """Return what the weights of pictures are called, by the levels that attend to them."""
    return {
        level: f"ip_weights_{level}"
        for level in sorted({a.level for a in config.cross_attentions()})
    }


def _ip_inputs(config: Config) -> Shapes:
    """What an IP-Adapter makes of pictures: keys and values of all layers, behind each other.

    The bias is -inf for a token that only fills up, else 0; a level's weights say how much each
    picture counts at each of its places. A shallow step reads of these what it needs.
    """
    width = sum(layer.width for layer in config.cross_attentions())
    shapes: Shapes = dict.fromkeys(("ip_keys", "ip_values"), ("B", "k", "t", width))
    shapes["ip_bias"] = ("B", "k", "t")
    for level, name in ip_weights(config).items():
        shapes[name] = ("g", "B", "k", *sides_of(level))
    return shapes


def sides_of(level: int) -> tuple[str, str]:
    """Return the symbols of a level's sides."""
    return (f"h{level}", f"w{level}") if level else ("h", "w")
