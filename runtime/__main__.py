"""`python -m runtime PROMPT`: draw pictures from the command line."""

import argparse
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine.backends.settings import ON_GPU, BackendSettings
from engine.errors import INTERRUPTED, USER_ERROR, LatentrtError, RequestError, said_of
from runtime.again import made_with, parse_again
from runtime.images.files import Sign, check_output, write_image
from runtime.images.previews import check_animation, parse_steps
from runtime.images.watermark import embed_watermark
from runtime.options import (
    AGAIN,
    backend_settings,
    load_arguments,
    make_parser,
    make_request,
    marking,
)
from runtime.output_options import OWN, UPSAMPLING
from runtime.pipeline import Pipeline
from runtime.plan import Plan
from runtime.request import Request
from runtime.terminal import Loading, say, show_progress

if TYPE_CHECKING:
    from runtime.finishing import Finisher
    from runtime.watched_steps import WatchedSteps

RANDOM_SEED = -1


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
        say(f"error: {make_parser(prog).in_options(str(error))}", sys.stderr)
        return USER_ERROR
    except OSError as error:
        say(f"error: {said_of(error)}", sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        say("\ncancelled; only the pictures named above were written", sys.stderr)
        return INTERRUPTED
    return 0


def _parse(arguments: Sequence[str] | None, prog: str = "python -m runtime") -> argparse.Namespace:
    """Read the command line; with `--again` what a picture was made with stands in for the rest.

    Raises RequestError when that picture does not say, and for an option without what it is for.
    """
    parser, options = parse_again(partial(make_parser, prog), arguments, AGAIN)
    if options.prompt is None:
        parser.error("give a PROMPT, or --again with a picture")
    if options.preview_decoder and not (options.preview_steps or options.animation):
        raise RequestError(
            "--preview-decoder came without a preview to draw; give --preview-steps or --animation"
        )
    _settle_seeds(options)
    return options


def _settle_seeds(options: argparse.Namespace) -> None:
    """Draw a seed for each -1, as other programs do; several seeds are as many pictures."""
    if options.seed == RANDOM_SEED:
        options.seed = None
    elif isinstance(options.seed, Sequence):
        options.seed = tuple(
            secrets.randbelow(2**32) if seed == RANDOM_SEED else seed for seed in options.seed
        )
        if options.num_images_per_prompt == 1:
            options.num_images_per_prompt = len(options.seed)


def _draw(options: argparse.Namespace) -> None:
    for path, check in ((options.out, check_output), (options.animation, check_animation)):
        if path:
            check(path)
    if options.out and options.animation and options.out.resolve() == options.animation.resolve():
        raise RequestError("--animation and --out are one file; give each a name of its own")
    sign = marking(options)
    backend = backend_settings(options)
    if options.expand:
        options.prompt = _expanded(options, backend)
    request = make_request(options)
    finisher = _finisher(options, backend)
    loading = Loading(options.model)
    with loading:
        pipeline, plan = _load(options, request, loading)
    if finisher:
        finisher.check_size(plan)
    _write(options, pipeline, plan, sign, finisher)


def _write(
    options: argparse.Namespace,
    pipeline: Pipeline,
    plan: Plan,
    sign: Sign | None,
    finisher: "Finisher | None",
) -> None:
    """Draw a plan group by group, and write each picture when its group is done.

    Raises RequestError at the end for those that are not written because they are found unsafe.
    """
    paths = iter(_paths(options, plan.seeds))
    watched = _watched(options, pipeline, plan, sign)
    groups = pipeline.groups(plan, options.batch_size)
    done, total = 0, sum(group.calls for group in groups)
    written: list[Path] = []
    kept = made_with(options, pipeline.model_path)
    if len(groups[0].seeds) > 1 and not pipeline.engines.is_exact:
        kept["batch_size"] = len(groups[0].seeds)
    for group in groups:
        for progress in pipeline.denoise(group):
            done += 1
            show_progress(done, total)
            if watched:
                watched.see(progress)
        images = pipeline.finish(group, pipeline.decode(progress.latents, group))
        finished = zip(_finished(finisher, images), group.settings, strict=True)
        for (image, more, note), settings in finished:
            path = next(paths)
            if image is not None:
                path = write_image(
                    image,
                    path,
                    {**settings, **kept, **more},
                    mark=options.mark,
                    sign=sign,
                    replaces=options.out is not None,
                )
                written.append(path)
                say(str(path), sys.stdout)
            if note:
                say(f"note: {path}: {note}", sys.stderr)
        if watched and options.watermark:
            images = [embed_watermark(image, options.watermark) for image in images]
        for path in watched.finish(group, progress.latents, images) if watched else ():
            say(str(path), sys.stdout)
    if watched and watched.steps:
        strip = written[0].with_name(f"{written[0].stem}-steps.png")
        replaces = options.out is not None
        say(str(watched.write_strip(plan, strip, replaces=replaces)), sys.stdout)
    if finisher:
        finisher.check_written(len(written), len(plan.seeds))


def _finisher(options: argparse.Namespace, backend: BackendSettings) -> "Finisher | None":
    """Return what is done to pictures before they are written, if anything is."""
    asked = ("upscale", *UPSAMPLING, "watermark", "safety_checker", "safety_action")
    if not any(getattr(options, name) for name in asked):
        return None
    from runtime.finishing import Finisher

    return Finisher.of(options, backend)


def _finished(
    finisher: "Finisher | None", images: Sequence[Image.Image]
) -> Iterator[tuple[Image.Image | None, Mapping[str, Any], str]]:
    """Yield pictures as they are to be written, as `Finisher.finished` does."""
    if finisher:
        yield from finisher.finished(images)
    else:
        yield from ((image, {}, "") for image in images)


def _watched(
    options: argparse.Namespace, pipeline: Pipeline, plan: Plan, sign: Sign | None
) -> "WatchedSteps | None":
    """Return what keeps the steps that are to be shown, if there are any."""
    if not options.preview_steps and not options.animation:
        return None
    from runtime.watched_steps import WatchedSteps

    return WatchedSteps(
        steps=parse_steps(options.preview_steps, plan.calls) if options.preview_steps else (),
        animations=_numbered(options.animation, len(plan.seeds)) if options.animation else (),
        previews=pipeline.previews if options.preview_decoder else None,
        mark=options.mark,
        sign=sign,
    )


def _load(options: argparse.Namespace, request: Request, loading: Loading) -> tuple[Pipeline, Plan]:
    """Load the model and open its engines; says what was concluded about it."""
    tiny = options.preview_decoder
    pipeline = Pipeline.load(
        options.model,
        **load_arguments(options),
        preview_decoder=Path(tiny) if tiny and tiny != OWN else None,
        fast_start=True,
    )
    chosen = pipeline.engines  # what was chosen makes the same picture again
    if options.backend is None and not chosen.is_small:
        from runtime.backend_note import openvino_note

        loading.note(*openvino_note(chosen))
    options.backend, options.precision = chosen.settings.backend, chosen.precision
    building = ["engines that the cache lacks are built first, which takes up to minutes each"]
    told = pipeline.notes
    loading.note(*told, *(building if options.build_missing else ()))
    plan = pipeline.plan(request)
    new = (*(note for note in pipeline.notes if note not in told), *plan.notes)
    loading.note(*(make_parser("").in_options(note) for note in new))
    if tiny:
        pipeline.engine("preview_decoder")  # what is wrong with it is found before a step
    pipeline.open_engines(plan)
    return pipeline, plan


def _expanded(options: argparse.Namespace, backend: BackendSettings) -> str:
    """Lengthen the prompt, and say what it became."""
    from runtime.expansion import PromptExpander

    if backend.backend in ON_GPU:  # a word at a time is no work for one
        backend = BackendSettings(threads=backend.threads)
    expand = PromptExpander.load(options.expand, graphs=options.graphs, settings=backend)
    seed = options.seed if isinstance(options.seed, int) else None
    prompt = expand(options.prompt, seed=seed, prompt_syntax=options.prompt_syntax)
    say(f"note: the prompt is {prompt!r}", sys.stderr)
    return prompt


def _paths(options: argparse.Namespace, seeds: Sequence[int]) -> list[Path]:
    """Name the files: `--out`, numbered if there are several, or the prompt and the seed."""
    if options.out is None:
        # 60 bytes, for file systems count bytes: letters of other scripts have up to four
        letters = re.sub(r"\W+", "-", options.prompt.lower()).strip("-")
        coding = sys.getfilesystemencoding()
        known = letters.encode(coding, "ignore").decode(coding).encode("utf-8", "ignore")
        name = known[:60].decode("utf-8", "ignore").strip("-") or "picture"
        paths = [Path(f"{name}-{seed}.png") for seed in seeds]
    else:
        paths = _numbered(options.out, len(seeds))
    for path in paths:
        check_output(path, replaces=options.out is not None)
    return paths


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]


if __name__ == "__main__":
    sys.exit(main())
