"""`python -m runtime PROMPT`: draw pictures from the command line."""

import argparse
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from engine.backends.settings import ON_GPU, BackendSettings
from engine.errors import INTERRUPTED, USER_ERROR, LatentrtError, RequestError
from runtime.again import made_with, settings_of
from runtime.control_options import CONTROL_FIELDS, controls_of
from runtime.images.canvas import ALPHA
from runtime.images.files import Sign, check_output, open_image, write_image
from runtime.images.previews import check_animation, parse_steps
from runtime.images.upscaling import Hires
from runtime.images.watermark import check_watermark, embed_watermark
from runtime.options import (
    AGAIN,
    FIELDS,
    HIRES,
    MADE_WITH,
    PIECES,
    backend_settings,
    load_arguments,
    make_parser,
)
from runtime.output_options import OWN
from runtime.pipeline import Pipeline
from runtime.plan import Plan
from runtime.regions import parse_region
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
        say(f"error: {error}", sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        say("\ncancelled; only the pictures named above were written", sys.stderr)
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
        folders = [options.lora_dir] if options.lora_dir else []
        found, notes = settings_of(options.again, actions, _given(arguments, prog), folders)
        for note in notes:
            say(f"note: {note}", sys.stderr)
        parser.set_defaults(**found)
        options = parser.parse_args(arguments)
    if options.prompt is None:
        parser.error("give a PROMPT, or --again with a picture")
    if options.preview_decoder and not (options.preview_steps or options.animation):
        raise RequestError(
            "--preview-decoder came without a preview to draw; give --preview-steps or --animation"
        )
    _settle_seeds(options)
    return options


def _given(arguments: Sequence[str] | None, prog: str) -> set[str]:
    """Return the names of the options that the user gives himself."""
    parser = make_parser(prog)
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(arguments)))


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
    sign = _sign(options)
    backend = backend_settings(options)
    if options.expand:
        options.prompt = _expanded(options, backend)
    request = _request(options)
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
    made_with = _made_with(options, pipeline)
    if len(groups[0].seeds) > 1 and not pipeline.engines.is_exact:
        made_with["batch_size"] = len(groups[0].seeds)
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
                    {**settings, **made_with, **more},
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
    asked = ("upscale", "watermark", "safety_checker", "safety_action")
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
    options.backend, options.precision = chosen.settings.backend, chosen.precision
    building = ["engines that the cache lacks are built first, which takes up to minutes each"]
    told = pipeline.notes
    loading.note(*told, *(building if options.build_missing else ()))
    plan = pipeline.plan(request)
    loading.note(*(note for note in pipeline.notes if note not in told), *plan.notes)
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
    for name in ("strength", "mask", "extend", "image_noise", "image_guidance_scale"):
        if getattr(options, name) is not None and not options.image:
            option = name.replace("_", "-")
            raise RequestError(f"--{option} came without --image; give the picture to start from")
    for name in HIRES:
        if getattr(options, name) is not None and options.hires_scale is None:
            option = "--hires-" + name.removeprefix("hires_num_inference_").removeprefix("hires_")
            raise RequestError(f"{option} came without --hires; give its scale")
    for name in ("image", "mask"):
        path = given[name]
        by_alpha = name == "mask" and path == Path(ALPHA)
        given[name] = ALPHA if by_alpha else path and open_image(path)
    given["regions"] = tuple(parse_region(*pair) for pair in options.regions)
    steered = options.controls or options.control_images or options.control_modes
    given["controls"] = controls_of(options) if steered else ()
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
        check_output(path)
    return paths


def _numbered(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i}") for i in range(1, count + 1)]


def _made_with(options: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """Return what makes a picture again beside the request, by the options' names."""
    names = (*MADE_WITH, *(("image", "mask") if options.image else ()))
    names += CONTROL_FIELDS if options.controls else ()
    names += tuple(name for name in ("upscale", "watermark", "regions") if getattr(options, name))
    names += tuple(name for name in PIECES if getattr(options, name))
    return made_with(options, names, pipeline.model_path)


if __name__ == "__main__":
    sys.exit(main())
