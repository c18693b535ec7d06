"""`python -m runtime PROMPT`: draw pictures from the command line."""

import argparse
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from PIL import Image

from engine.backends.settings import ON_GPU, BackendSettings
from engine.errors import INTERRUPTED, USER_ERROR, LatentrtError, RequestError
from runtime.again import settings_of
from runtime.images.files import (
    SOURCE_KEY,
    Sign,
    SourceType,
    check_output,
    program_version,
    read_image,
    write_image,
)
from runtime.images.previews import (
    Preview,
    check_animation,
    parse_steps,
    side_by_side,
    write_animation,
)
from runtime.images.upscaling import Hires
from runtime.images.watermark import check_watermark, embed_watermark
from runtime.options import AGAIN, FIELDS, HIRES, MADE_WITH, OWN, make_parser
from runtime.pipeline import Pipeline
from runtime.plan import Array, Plan
from runtime.request import Request

BAR_WIDTH = 30
SIGNS = (0.5, 8.0)  # seconds between signs of life on a terminal, and before one in a pipe


def main(arguments: Sequence[str] | None = None, prog: str = "python -m runtime") -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C.

    prog: what the usage calls it
    """
    # As engine.errors.exit_status does for the other commands; here, so that a prompt's way to its
    # pixels leads through no file more.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _draw(_parse(arguments, prog))
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\ncancelled; only the pictures named above were written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parse(arguments: Sequence[str] | None, prog: str = "python -m runtime") -> argparse.Namespace:
    """Read the command line; with `--again` what a picture was made with stands in for the rest.

    Raises RequestError when that picture does not say, and for an option without what it is for.
    """
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    if options.again:
        actions = [action for action in parser._actions if action.dest in AGAIN]
        parser.set_defaults(**settings_of(options.again, actions))
        options = parser.parse_args(arguments)
    if options.prompt is None:
        parser.error("give a PROMPT, or --again with a picture")
    if options.preview_decoder and not (options.preview_steps or options.animation):
        raise RequestError(
            "--preview-decoder came without a preview to draw; give --preview-steps or --animation"
        )
    return options


def _draw(options: argparse.Namespace) -> None:
    for path, check in ((options.out, check_output), (options.animation, check_animation)):
        if path:
            check(path)
    sign = _sign(options)
    backend = BackendSettings(
        backend=options.backend, threads=options.threads, build_missing=options.build_missing
    )
    if options.expand:
        options.prompt = _expanded(options, backend)
    request = _request(options)
    tiny = options.preview_decoder
    loading = _Loading(options.model)
    with loading:
        pipeline, plan = _load(options, backend, request, loading)
    paths = _paths(options, plan.seeds)
    shown = parse_steps(options.preview_steps, plan.calls) if options.preview_steps else ()
    watched: dict[int, Array] = {}
    for progress in pipeline.denoise(plan):
        _show_progress(progress.step, progress.total)
        if options.animation or progress.step in shown:
            watched[progress.step] = progress.denoised()
    pictures = pipeline.finish(plan, pipeline.decode(progress.latents))
    if options.watermark:
        pictures = [embed_watermark(picture, options.watermark) for picture in pictures]
    for picture, path, settings in zip(pictures, paths, plan.settings, strict=True):
        made_with = {**settings, **_made_with(options)}
        write_image(picture, path, made_with, mark=options.mark, sign=sign)
        print(path)
    if watched:
        draw = pipeline.previews if tiny else Preview.fit(progress.latents, pictures).draw
        size = pictures[0].size
        frames = {step: [f.resize(size) for f in draw(seen)] for step, seen in watched.items()}
        if plan.calls in frames:
            frames[plan.calls] = pictures
        _write_watched(options, frames, shown, paths[0], plan.source_type, sign)


def _load(
    options: argparse.Namespace, backend: BackendSettings, request: Request, loading: "_Loading"
) -> tuple[Pipeline, Plan]:
    """Load the model and open its engines; says what was concluded about it."""
    tiny = options.preview_decoder
    pipeline = Pipeline.load(
        options.model,
        vae=options.vae,
        preview_decoder=Path(tiny) if tiny and tiny != OWN else None,
        loras=options.loras,
        lora_dir=options.lora_dir,
        wildcard_dir=options.wildcard_dir,
        embeddings=options.embeddings,
        prediction_type=options.prediction_type,
        graphs=options.graphs,
        precision=options.precision,
        settings=backend,
        fast_start=True,
    )
    chosen = pipeline.engines  # what was chosen makes the same picture again
    options.backend, options.precision = chosen.settings.backend, chosen.precision
    building = ["engines that the cache lacks are built first, which takes up to minutes each"]
    loading.note(*pipeline.model.notes, *(building if options.build_missing else ()))
    plan = pipeline.plan(request)
    loading.note(*plan.notes)
    if tiny:
        pipeline.engine("preview_decoder")  # what is wrong with it is found before a step
    pipeline.open_engines(plan)
    return pipeline, plan


def _sign(options: argparse.Namespace) -> Sign | None:
    """Return what signs files, if they are to be signed; checks what is written before all work."""
    if options.watermark is not None:
        check_watermark(options.watermark)
    if not options.c2pa_cert and not options.c2pa_key:
        return None
    if not options.c2pa_cert or not options.c2pa_key:
        raise RequestError(
            "--c2pa-cert and --c2pa-key belong together; give the certificate and its private key"
        )
    from runtime.images.credentials import Credentials

    return Credentials.read(options.c2pa_cert, options.c2pa_key).sign


def _request(options: argparse.Namespace) -> Request:
    """Make the request; reads the pictures. Raises RequestError."""
    given = {name: getattr(options, name) for name in FIELDS}
    for name in ("strength", "mask", "extend"):
        if getattr(options, name) is not None and not options.image:
            raise RequestError(f"--{name} came without --image; give the picture to start from")
    for name in HIRES:
        if getattr(options, name) is not None and options.hires_scale is None:
            option = "--hires-" + name.removeprefix("hires_num_inference_").removeprefix("hires_")
            raise RequestError(f"{option} came without --hires; give its scale")
    for name in ("image", "mask"):
        given[name] = read_image(given[name]) if given[name] else None
    if options.hires_scale is not None:
        hires = {f: getattr(options, name) for name, f in HIRES.items()}
        given["hires"] = Hires(**{k: v for k, v in hires.items() if v is not None})
    return Request(**given)


def _expanded(options: argparse.Namespace, backend: BackendSettings) -> str:
    """Lengthen the prompt, and say what it became."""
    from runtime.expansion import PromptExpander

    if backend.backend in ON_GPU:  # a word at a time is no work for one
        backend = BackendSettings(threads=backend.threads)
    expand = PromptExpander.load(options.expand, graphs=options.graphs, settings=backend)
    seed = options.seed if isinstance(options.seed, int) else None
    prompt = expand(options.prompt, seed=seed, prompt_syntax=options.prompt_syntax)
    print(f"note: the prompt is {prompt!r}", file=sys.stderr)
    return prompt


def _write_watched(
    options: argparse.Namespace,
    frames: Mapping[int, Sequence[Image.Image]],
    shown: Sequence[int],
    first: Path,
    source_type: SourceType,
    sign: Sign | None,
) -> None:
    """Write the strip of steps and the animations; frames: by step, one for each picture."""
    count = len(next(iter(frames.values())))
    if shown:
        strip = first.with_name(f"{first.stem}-steps.png")
        rows = [[frames[step][i] for step in shown] for i in range(count)]
        sheet = side_by_side(rows, [f"step {step}" for step in shown])
        sheet.info[SOURCE_KEY] = source_type
        write_image(sheet, strip, {}, mark=options.mark, sign=sign)
        print(strip)
    if options.animation:
        for i, path in enumerate(_numbered(options.animation, count)):
            shots = [frames[step][i] for step in sorted(frames)]
            marked_as = source_type if options.mark else None
            write_animation(path, shots, source_type=marked_as, sign=sign)
            print(path)


def _paths(options: argparse.Namespace, seeds: Sequence[int]) -> list[Path]:
    """Name the files: `--out`, numbered if there are several, or the prompt and the seed."""
    if options.out is None:
        # 60 bytes, for file systems count bytes: letters of other scripts have up to four
        words = re.sub(r"\W+", "-", options.prompt.lower()).strip("-").encode("utf-8", "ignore")
        name = words[:60].decode("utf-8", "ignore").strip("-") or "picture"
        paths = [Path(f"{name}-{seed}.png") for seed in seeds]
    else:
        paths = _numbered(options.out, len(seeds))
    for path in paths:
        check_output(path)
    return paths


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]


def _made_with(options: argparse.Namespace) -> dict[str, Any]:
    """Collect what makes a picture again beside the request."""
    names = (*MADE_WITH, *(("image", "mask") if options.image else ()))
    names += ("watermark",) if options.watermark else ()
    given = {name: getattr(options, name) for name in names}
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in given.items()},
        "latentrt": program_version(),
    }


class _Loading:
    """A sign of life while a model loads: a line that counts on a terminal, else one late note."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._shown = False
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._erase()

    def note(self, *notes: str) -> None:
        """Print notes, not into the line that counts."""
        with self._lock:
            for note in notes:
                self._erase()
                print(f"note: {note}", file=sys.stderr)

    def _count(self) -> None:
        if sys.stderr is None:
            return
        began, shows = time.monotonic(), sys.stderr.isatty()
        while not self._over.wait(SIGNS[not shows]):
            with self._lock:
                seconds = time.monotonic() - began
                if not shows:
                    print(f"note: loading {self._model}", file=sys.stderr)
                    return
                print(f"\rloading {self._model[-40:]}: {seconds:.0f} s", end="", file=sys.stderr)
                sys.stderr.flush()
                self._shown = True

    def _erase(self) -> None:
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr)
            self._shown = False


def _show_progress(step: int, total: int) -> None:
    """Draw a bar on a terminal; in a pipe stay quiet."""
    if not sys.stderr.isatty():
        return
    done = BAR_WIDTH * step // total
    bar = "█" * done + "░" * (BAR_WIDTH - done)
    print(f"\r{bar} step {step}/{total}", end="\n" if step == total else "", file=sys.stderr)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
