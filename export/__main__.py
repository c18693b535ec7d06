"""`python -m export`: trace graphs of models, and say what a file is.

python -m export MODEL                   trace a model's architecture, check it against torch
python -m export MODEL --backend NAME    build engines of TensorRT or TensorRT-RTX into the cache
python -m export language-model FOLDER   the same for a GPT-2, which makes prompts longer
python -m export control-net FILE        the same for a ControlNet, and the model that it steers
python -m export info FILE               say what a checkpoint or an adapter is
python -m export cache                   list, verify and prune what the cache holds
python -m export graphs                  trace the architectures that ship
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from engine.checkpoints.pieces import PIECES
from engine.command_line import CommandParser
from engine.errors import RequestError, exit_status, libraries_of, nearest
from engine.graphs.graph import Precision, graph_name
from engine.graphs.steering import CONTROLLED_LEVELS
from engine.model import COMPONENTS, Model, find_model, shipped_models
from engine.shipped import GRAPHS, find_control
from engine.store.cache import cache_folder, made_folder
from engine.store.eviction import cache_limit, parse_size
from export.cache import as_json, as_text, list_cache, prune_cache
from export.engine_options import add_engine_options, check_no_engine, engine_choices
from export.engines import build_engines
from export.info import as_table, describe


def main(arguments: Sequence[str] | None = None, prog: str = "python -m export") -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C.

    prog: what the usage calls it
    """
    return exit_status(
        lambda: _run(list(sys.argv[1:] if arguments is None else arguments), prog),
        cancelled="cancelled; the graphs listed above are whole",
    )


def _run(given: list[str], prog: str) -> None:
    command = given[0] if given and given[0] in _COMMANDS else "model"
    if command == "model" and (meant := _meant(*given[:1])):
        raise RequestError(f"{given[0]} is no subcommand; did you mean `{prog} {meant}`?")
    named = prog if command == "model" else f"{prog} {command}"
    options = _PARSERS[command](named).parse_args(given if command == "model" else given[1:])
    with libraries_of("export"):
        _COMMANDS[command](options)


def _meant(first: str = "") -> str:
    """Return the subcommand that a first word stands for; "" where it may be a model."""
    is_model = not first or first in shipped_models() or Path(first).exists()
    return "" if is_model else nearest(first, _COMMANDS.keys() - {"model"})


def _info(options: argparse.Namespace) -> None:
    facts = describe(options.file)
    print(json.dumps(facts, indent=2) if options.json else as_table(facts))


def _cache(options: argparse.Namespace) -> None:
    folder, limit = cache_folder(), cache_limit()
    if options.prune is None:
        listing = list_cache(folder, limit, verify=options.verify)
    else:
        listing = prune_cache(folder, limit, parse_size(options.prune))
    print(json.dumps(as_json(listing), indent=2) if options.json else as_text(listing))


def _model(options: argparse.Namespace) -> None:
    from export.writing import export_part

    if options.model is None and options.unet is None:
        raise RequestError("give a MODEL, or --unet FILE with the parts that belong to it")
    pieces = {name: getattr(options, name) for name in PIECES}
    model = Model.open(
        options.unet if options.model is None else find_model(options.model),
        **pieces,
        vae=options.vae,
        preview_decoder=options.preview_decoder,
        prediction_type=options.prediction_type,
    )
    usual = [part for part in COMPONENTS if part not in (*CONTROLLED_LEVELS, "step_shrunk")]
    parts = options.parts or [part for part in usual if COMPONENTS[part] in model.configs]
    if not options.backend:
        check_no_engine(options)
    elif options.out:
        raise RequestError("--out came with --backend; engines go into the cache, so leave it out")
    if options.backend:
        for line in build_engines(model, parts, engine_choices(model, options)):
            print(line, flush=True)
        return
    folder = made_folder(options.out or cache_folder() / "graphs")
    for part in parts:
        print(export_part(model, part, options.precision or "float32", folder))


def _language_model(options: argparse.Namespace) -> None:
    from engine.checkpoints.gpt2 import LanguageModel
    from export.writing import export_language_model

    model = LanguageModel.open(options.folder)
    folder = made_folder(options.out or cache_folder() / "graphs")
    print(export_language_model(model, options.precision or "float32", folder))


def _control_net(options: argparse.Namespace) -> None:
    from export.writing import export_control_net, export_part

    model = Model.open(find_model(options.model), vae=options.vae)
    folder = made_folder(options.out or cache_folder() / "graphs")
    precision: Precision = options.precision or "float32"
    for line in export_control_net(model, find_control(options.file), precision, folder):
        print(line, flush=True)
    for part in ("step_controlled", "step_shallow_controlled"):
        if not (folder / graph_name(part, model.config(part), precision)).exists():
            print(export_part(model, part, precision, folder), flush=True)


def _graphs(options: argparse.Namespace) -> None:
    from export.published import precisions, published_parts
    from export.writing import write_published

    folder = made_folder(options.out)
    parts = options.parts or COMPONENTS
    for part, config in (found for found in published_parts() if found[0] in parts):
        for precision in precisions(part, config):
            print(write_published(part, config, precision, folder), flush=True)


def _model_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="Trace a model's parts to ONNX graphs and check each against torch, or build "
        "engines of them.",
        epilog="also: python -m export info FILE (what a file is), python -m export cache, "
        "python -m export language-model FOLDER, python -m export control-net FILE, "
        "python -m export graphs",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a model that ships, a folder or a file; or give --unet and its other parts",
    )
    for name in ("vae", *PIECES):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=Path, metavar="FILE", help="another, or a folder")
    parser.add_argument("--preview-decoder", type=Path, metavar="FILE", help="such as TAESD's")
    parser.add_argument("--prediction-type", help="where the model does not tell")
    _add_choices(parser)
    _add_parts(parser, "all that the model has")
    add_engine_options(parser)
    return parser


def _language_model_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="Trace a GPT-2 to an ONNX graph with its cache and check it against torch.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="config.json and weights, as transformers saves"
    )
    _add_choices(parser)
    return parser


def _control_net_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="Trace a ControlNet to ONNX graphs and check them against torch, and with it "
        "the step of the model that it steers.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="or a folder of diffusers")
    parser.add_argument("--model", required=True, help="which it steers: a folder or a file")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="another autoencoder")
    _add_choices(parser)
    return parser


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the graphs go (default: the cache, where the runtime finds them)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="what the graphs compute in (default: float32; of engines float16)",
    )


def _add_parts(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=tuple(COMPONENTS),
        metavar="PART",
        help=f"some of {', '.join(COMPONENTS)} (default: {default})",
    )


def _info_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="Say what a file is: a checkpoint, an autoencoder, a LoRA or its kin, a "
        "textual inversion. Nothing in it is run.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="or a folder, or a model that ships"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _cache_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="List what the cache holds: what it is, its size and when it was last used.",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every byte, and say what is damaged"
    )
    parser.add_argument(
        "--prune",
        nargs="?",
        const="none",
        metavar="SIZE",
        help="verify, and remove what is damaged or left over; with a size such as 10GB, also the "
        "engines used longest ago until the others fit",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _graphs_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="Trace the published architectures without weights; minutes, not gigabytes.",
    )
    parser.add_argument(
        "--out", type=Path, default=GRAPHS, metavar="FOLDER", help="(default: %(default)s)"
    )
    _add_parts(parser, "all that ship")
    return parser


_COMMANDS = {
    "model": _model,
    "language-model": _language_model,
    "control-net": _control_net,
    "info": _info,
    "cache": _cache,
    "graphs": _graphs,
}
_PARSERS = {
    "model": _model_parser,
    "language-model": _language_model_parser,
    "control-net": _control_net_parser,
    "info": _info_parser,
    "cache": _cache_parser,
    "graphs": _graphs_parser,
}

if __name__ == "__main__":
    sys.exit(main())
