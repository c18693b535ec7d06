"""The options of `python -m export MODEL --backend NAME`: for which sizes and GPUs, and how."""

import argparse
from collections.abc import Sequence
from dataclasses import fields

from engine.backends.settings import BackendSettings, graph_precision
from engine.backends.tensorrt.build_request import LEVELS, BuildSettings
from engine.backends.tensorrt.library import LIBRARIES, parse_targets
from engine.backends.tensorrt.profiles import TOKENS, Profile, Range, parse_range
from engine.errors import BackendError, RequestError
from engine.graphs.graph import Precision
from engine.model import Model
from export.engines import Choices

SIZES = tuple(field.name for field in fields(Profile))
HELP = {
    "height": "pixels (default: the model's own)",
    "width": "pixels (default: the model's own)",
    "batch": "pictures at once (default: 1)",
    "tokens": "of the prompt (default: one row of the text encoder)",
    "groups": "of conditionings at once: 1 unguided, 2 guided, more for composed prompts "
    "(default: 1:2:2)",
    "rows": "texts that a text encoder reads at once (default: 1:2:32)",
}


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of engines to the parser of a model."""
    group = parser.add_argument_group(
        "engines",
        "Sizes are SIZE, MIN:MAX or MIN:BEST:MAX; one size alone makes the fastest engine. "
        "With commas between, as in --height 512,768 --width 512,768, an engine has several "
        "profiles.",
    )
    add = group.add_argument
    add("--backend", choices=tuple(LIBRARIES), help="build engines, into the cache")
    for name in SIZES:
        add(f"--{name}", metavar="SIZES", help=HELP[name])
    add(
        "--target",
        metavar="SM,SM",
        help="GPUs to build for, such as sm86,sm89,sm120; tensorrt_rtx builds for them without a "
        "GPU (default: the one at hand)",
    )
    add(
        "--refit",
        action="store_true",
        help="let adapters and other checkpoints change the weights in place; such an engine may "
        "be slower",
    )
    add(
        "--lora",
        dest="loras",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="an adapter to build in; may be given several times",
    )
    add(
        "--optimization-level",
        type=int,
        choices=LEVELS,
        help="0 builds soonest, 5 runs fastest (default: the library's)",
    )
    add(
        "--workspace",
        type=float,
        metavar="GIB",
        help="GPU memory that a layer may take while it is tried, such as 4 on a card of 12 that "
        "also has a desktop (default: no limit)",
    )


def check_no_engine(options: argparse.Namespace) -> None:
    """Refuse an option of engines where graphs are traced, and none are built: RequestError."""
    for name in (*SIZES, "target", "refit", "loras", "optimization_level", "workspace"):
        if getattr(options, name) not in (None, False, []):
            option = "lora" if name == "loras" else name.replace("_", "-")
            raise RequestError(
                f"--{option} came without --backend, which builds engines; give both, or leave it "
                "out"
            )


def engine_choices(model: Model, options: argparse.Namespace) -> Choices:
    """Read the options; raises BackendError."""
    library = options.backend
    precision: Precision = options.precision or "float16"
    graph_precision(BackendSettings(backend=library), precision)
    workspace = options.workspace
    if workspace is not None and not workspace > 0:
        raise BackendError(f"--workspace is {workspace}; give a size in GiB above 0")
    return Choices(
        library=library,
        precision=precision,
        settings=BuildSettings(
            profiles=_profiles(model, options),
            refit=options.refit,
            optimization_level=options.optimization_level,
            workspace_bytes=None if workspace is None else round(workspace * 2**30),
        ),
        targets=parse_targets(options.target, library) if options.target else (None,),
        loras=tuple(options.loras),
    )


def _profiles(model: Model, options: argparse.Namespace) -> tuple[Profile, ...]:
    side = model.sample_size * model.vae.compression
    rows = [config.max_position_embeddings for config in model.text_encoders.values()]
    given: dict[str, Sequence[Range]] = {
        "height": [Range(side, side, side)],
        "width": [Range(side, side, side)],
        "tokens": [Range(rows[0], rows[0], rows[0])] if rows else [TOKENS],
    }
    for name in SIZES:
        if text := getattr(options, name):
            given[name] = [parse_range(each) for each in text.split(",")]
    count = max(map(len, given.values()))
    odd = [name for name, ranges in given.items() if len(ranges) not in (1, count)]
    if odd:
        raise BackendError(
            f"--{odd[0]} names {len(given[odd[0]])} ranges and another option {count}; give one, "
            "or one for each profile"
        )
    return tuple(
        Profile(**{name: ranges[i % len(ranges)] for name, ranges in given.items()})
        for i in range(count)
    )


__all__ = ["add_engine_options", "check_no_engine", "engine_choices"]
