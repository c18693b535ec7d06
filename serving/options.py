"""The options of `latentrt serve`, and what is found by them before anything listens."""

import argparse
from pathlib import Path

from engine.backends.settings import BUILT_BEFOREHAND, ON_GPU
from engine.command_line import CommandParser
from engine.errors import RequestError
from engine.model import shipped_models
from engine.shipped import shipped_controls
from engine.store.eviction import parse_size
from runtime.options import add_engine_options, backend_settings, marking
from runtime.output_options import SIGNING_OPTIONS
from serving.addresses import is_loopback
from serving.configuration import CONFIG, PREFIX
from serving.engine_settings import EngineSettings
from serving.keys import Keys
from serving.limits import Limits
from serving.memory import total_bytes
from serving.model_files import list_files
from serving.operator_files import (
    find_adapters,
    find_controls,
    find_folder,
    find_ip_adapters,
    find_models,
    find_upscalers,
)
from serving.row_limits import ROWS, parse_rows

HOST, PORT = "127.0.0.1", 7860
ON_CARDS = tuple(name for name in ON_GPU if name != "webgpu")  # which chooses by itself
MOST_CARDS = 64


def make_parser(prog: str) -> CommandParser:
    """Return the parser; prog: what the usage calls the command."""
    parser = CommandParser(
        prog=prog,
        description="Serve pictures over HTTP: OpenAI's Images API, Automatic1111's and a native "
        "one.",
    )
    parser.add_argument(
        f"--{CONFIG}",
        type=Path,
        metavar="FILE",
        help="TOML with these options by their names, such as port = 8080; variables "
        f"{PREFIX}PORT and the like, and the command line, go before it",
    )
    _add_models(parser.add_argument_group("what is drawn with"))
    _add_doors(parser.add_argument_group("who may come in"))
    _add_work(parser.add_argument_group("how much is taken on"))
    written = parser.add_argument_group("what pictures hold")
    for flags, settings in SIGNING_OPTIONS:
        written.add_argument(*flags, **settings)
    return parser


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-m",
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a model and the name that requests know it by, or one that ships; may be given "
        "several times, and the first is drawn with where none is named (default: pictogram)",
    )
    group.add_argument(
        "--lora-dir",
        type=Path,
        metavar="FOLDER",
        help="whose .safetensors files requests may name, without that ending",
    )
    group.add_argument(
        "--control",
        dest="controls",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a ControlNet's or T2I-Adapter's file or folder and the name that requests know it "
        "by; may be given several times",
    )
    group.add_argument(
        "--control-dir",
        type=Path,
        metavar="FOLDER",
        help="of ControlNets and T2I-Adapters, files and folders, which requests may name without "
        "their endings",
    )
    group.add_argument(
        "--ip-adapter-dir",
        dest="ip_adapter_dirs",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="of IP-Adapters, which requests may name without their endings; may be given several "
        "times",
    )
    group.add_argument(
        "--image-encoder",
        dest="image_encoders",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="an image encoder that IP-Adapters see pictures through, each the one that fits; may "
        "be given several times (default: image_encoder/ in the folders of IP-Adapters)",
    )
    group.add_argument(
        "--upscaler-dir",
        type=Path,
        metavar="FOLDER",
        help="of upscalers, which requests may name without their endings",
    )
    group.add_argument(
        "--wildcard-dir",
        type=Path,
        metavar="FOLDER",
        help="of text files, whose lines prompts may choose from as __NAME__",
    )
    group.add_argument(
        "--model-memory",
        metavar="SIZE",
        help="weights that stay loaded, such as 20GB, or none for any number; a model with other "
        "adapters is another (default: half of this machine's memory)",
    )
    add_engine_options(group)
    group.add_argument(
        "--devices",
        dest="cards",
        metavar="N[,N…]",
        help=f"NVIDIA GPUs by their numbers, with an engine on each ({', '.join(ON_CARDS)})",
    )


def _add_doors(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--host", default=HOST, help="the address to listen on (default: %(default)s)")
    add("--port", type=int, default=PORT, help="(default: %(default)s)")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="lines of NAME:SHA256, a hash for each key; needed beyond this machine",
    )
    add("--open", action="store_true", help="let everybody in, from other machines too")
    add(
        "--allow-host",
        dest="hosts",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that this server is called by, such as a proxy's",
    )
    add(
        "--allow-origin",
        dest="origins",
        action="append",
        default=[],
        metavar="URL",
        help="a site whose pages may use this server, such as https://app.example",
    )


def _add_work(group: argparse._ArgumentGroup) -> None:
    limits = Limits()
    add = group.add_argument
    add(
        "--rows",
        default="preview",
        metavar="N",
        help="pictures at most in one step: preview for as many as gain, but at least "
        f"{ROWS}, so that pictures begin soon; capacity for as many as gain; or a number "
        "(default: %(default)s)",
    )
    add(
        "--max-queue",
        type=int,
        default=limits.jobs,
        metavar="N",
        help="unfinished requests, beyond which others are refused (default: %(default)s)",
    )
    add(
        "--max-queue-seconds",
        type=float,
        default=limits.queue_seconds,
        metavar="S",
        help="of unfinished work, beyond which others are refused (default: %(default)s)",
    )


def read_keys(options: argparse.Namespace) -> Keys | None:
    """Return the keys. Raises RequestError where strangers could come in without one."""
    if options.api_key_file is not None and options.open:
        raise RequestError(
            "--open came with --api-key-file; one lets everybody in and one who has a key, so "
            "leave one out"
        )
    if options.api_key_file is not None:
        return Keys.read(options.api_key_file)
    if not is_loopback(options.host) and not options.open:
        raise RequestError(
            f"--host {options.host} lets other machines in; give --api-key-file with the keys of "
            "those who may, or --open to let everybody in"
        )
    return None


def engine_settings(options: argparse.Namespace) -> EngineSettings:
    """Return what the engine draws with. Raises RequestError or ModelError, and as `marking`."""
    marking(options)
    backend_settings(options)  # what does not go together is found before a process is told
    for name, minimum in (("max_queue", 1), ("port", 0)):
        if getattr(options, name) < minimum:
            option = name.replace("_", "-")
            raise RequestError(f"--{option} is {getattr(options, name)}; give {minimum} or more")
    if not options.max_queue_seconds > 0:
        raise RequestError(f"--max-queue-seconds is {options.max_queue_seconds}; give more than 0")
    models = find_models(options.models or ["pictogram"])
    loras = {} if options.lora_dir is None else find_adapters(options.lora_dir)
    controls = find_controls(options.controls, options.control_dir)
    ip_adapters, encoders = find_ip_adapters(options.ip_adapter_dirs, options.image_encoders)
    upscalers = find_upscalers(options.upscaler_dir)
    for what, found, given in (
        ("ControlNets", controls, "--control and --control-dir"),
        ("IP-Adapters", ip_adapters, "--ip-adapter-dir"),
    ):
        if found and options.backend in BUILT_BEFOREHAND:
            raise RequestError(
                f"the backend {options.backend} runs no {what} yet; choose --backend cuda, webgpu, "
                f"cpu or openvino, or leave {given} out"
            )
    if options.backend not in BUILT_BEFOREHAND and {*models.values()} & {*shipped_models()}:
        controls = {**{name: str(path) for name, path in shipped_controls().items()}, **controls}
    named = (models, loras, controls, ip_adapters, encoders, upscalers)
    paths = [path for each in named for path in each.values()]
    return EngineSettings(
        models=models,
        loras=loras,
        controls=controls,
        ip_adapters=ip_adapters,
        image_encoders=encoders,
        upscalers=upscalers,
        files={path: list_files(Path(path)) for path in paths if path not in shipped_models()},
        backend=options.backend,
        device=options.device,
        precision=options.precision,
        threads=options.threads,
        build_missing=options.build_missing,
        wildcard_dir=find_folder("--wildcard-dir", options.wildcard_dir),
        graphs=_resolved(options.graphs),
        rows=parse_rows(options.rows),
        model_bytes=read_model_memory(options.model_memory),
        c2pa_cert=_resolved(options.c2pa_cert),
        c2pa_key=_resolved(options.c2pa_key),
        watermark=options.watermark,
        limits=Limits(jobs=options.max_queue, queue_seconds=options.max_queue_seconds),
    )


def _resolved(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def read_cards(options: argparse.Namespace) -> list[int]:
    """Return the GPUs that engines run on, none where nobody chose. Raises RequestError."""
    if options.cards is None:
        return []
    if options.backend not in ON_CARDS:
        raise RequestError(
            f"--devices {options.cards} came with the backend {options.backend or 'left open'}; it "
            f"numbers NVIDIA's GPUs, so choose --backend {', '.join(ON_CARDS)}"
        )
    given = [part.strip() for part in str(options.cards).split(",")]
    cards = [int(part) for part in given if part.isascii() and part.isdecimal() and len(part) < 4]
    if len(cards) < len(given) or len(set(cards)) < len(cards) or len(cards) > MOST_CARDS:
        raise RequestError(
            f"--devices is {options.cards}; give numbers of GPUs with commas between, each once, "
            "such as 0,1"
        )
    return cards


def read_model_memory(text: str | None) -> int | None:
    """Return how many bytes of weights stay loaded, None for any number. Raises RequestError."""
    if text is None:
        total = total_bytes()
        return None if total is None else total // 2
    try:
        return parse_size(text)
    except RequestError as error:
        raise RequestError(f"--model-memory: {error}") from None
