"""`python -m runtime PROMPT`: draw pictures from the command line."""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.backends import BackendSettings
from engine.errors import LatentrtError, RequestError
from engine.models import shipped_models
from runtime.images import check_output, read_image, write_image
from runtime.pipeline import GUIDANCE_SCALE, STEPS, Pipeline
from runtime.plan import Plan
from runtime.request import Request
from runtime.samplers import SAMPLERS, SCHEDULES
from runtime.schedule import PREDICTION_TYPES

USER_ERROR = 2
INTERRUPTED = 130
BAR_WIDTH = 30
STRENGTH = 0.8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        _draw(options)
    except LatentrtError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("\ncancelled; only the pictures named above were written", file=sys.stderr)
        return INTERRUPTED
    return 0


def _draw(options: argparse.Namespace) -> None:
    if options.strength is not None and not options.image:
        raise RequestError("--strength came without --image; give the picture to start from")
    image = read_image(options.image) if options.image else None
    request = Request(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        num_images_per_prompt=options.num_images,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        sampler=options.sampler,
        schedule=options.schedule,
        height=options.height,
        width=options.width,
        seed=options.seed,
        image=image,
        strength=STRENGTH if options.strength is None else options.strength,
        prompt_syntax=not options.plain_prompt,
        clip_skip=options.clip_skip,
    )
    settings = BackendSettings(threads=options.threads)
    if options.out:
        check_output(options.out)
    pipeline = Pipeline.load(
        options.model,
        vae=options.vae,
        loras=options.lora,
        embeddings=options.embedding,
        prediction_type=options.prediction_type,
        graphs=options.graphs,
        precision=options.precision,
        settings=settings,
    )
    for note in pipeline.model.notes:
        print(f"note: {note}", file=sys.stderr)
    plan = pipeline.plan(request)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    paths = _paths(options, plan.seeds)
    for progress in pipeline.denoise(plan):
        _show_progress(progress.step, progress.total)
        latents = progress.latents
    for picture, path, seed in zip(pipeline.decode(latents), paths, plan.seeds, strict=True):
        write_image(picture, path, _settings(options, plan, seed))
        print(path)


def _paths(options: argparse.Namespace, seeds: Sequence[int]) -> list[Path]:
    """Name the files: `--out`, numbered if there are several, or the prompt and the seed."""
    if options.out is None:
        # 60 bytes, for file systems count bytes: letters of other scripts have up to four
        words = re.sub(r"\W+", "-", options.prompt.lower()).strip("-").encode("utf-8", "ignore")
        name = words[:60].decode("utf-8", "ignore").strip("-") or "picture"
        paths = [Path(f"{name}-{seed}.png") for seed in seeds]
    elif len(seeds) == 1:
        paths = [options.out]
    else:
        out: Path = options.out
        paths = [out.with_stem(f"{out.stem}-{i}") for i in range(1, len(seeds) + 1)]
    for path in paths:
        check_output(path)
    return paths


def _settings(options: argparse.Namespace, plan: Plan, seed: int) -> dict[str, Any]:
    """Collect what makes this picture again."""
    try:
        latentrt = version("latentrt")
    except PackageNotFoundError:  # run from a checkout
        latentrt = "unknown"
    settings = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": seed,
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "sampler": options.sampler,
        "schedule": options.schedule,
        "height": plan.height,
        "width": plan.width,
        "model": str(options.model),
        "vae": str(options.vae) if options.vae else None,
        "loras": options.lora,
        "embeddings": [str(path) for path in options.embedding],
        "prediction_type": options.prediction_type,
        "prompt_syntax": not options.plain_prompt,
        "clip_skip": options.clip_skip,
        "precision": options.precision,
        "latentrt": latentrt,
    }
    if options.image:
        strength = STRENGTH if options.strength is None else options.strength
        settings |= {"image": options.image.name, "strength": strength}
    return settings


def _show_progress(step: int, total: int) -> None:
    """Draw a bar on a terminal; in a pipe stay quiet."""
    if not sys.stderr.isatty():
        return
    done = BAR_WIDTH * step // total
    bar = "█" * done + "░" * (BAR_WIDTH - done)
    print(f"\r{bar} step {step}/{total}", end="\n" if step == total else "", file=sys.stderr)
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime",
        description="Draw a picture from a text, with a latent-diffusion model.",
        epilog='example: python -m runtime "a red apple, fluent style" --seed 7 --out apple.png',
    )
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what to draw")
    add(
        "--model",
        default="pictogram",
        help=f"a model that ships ({', '.join(shipped_models()) or 'none'}), a folder in "
        "diffusers' layout, or a .safetensors or .ckpt file (default: %(default)s)",
    )
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="an adapter (LoRA, LoCon, LoHa, LoKr) to add; may be given several times",
    )
    add(
        "--embedding",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a textual inversion; its word then means what it learned; may be given several times",
    )
    add("--vae", type=Path, metavar="FILE", help="another autoencoder, a file or a folder")
    add(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the model was trained to predict, where its file does not tell",
    )
    add("--negative-prompt", default="", metavar="TEXT", help="what to keep away from")
    add(
        "--plain-prompt",
        action="store_true",
        help="take brackets in prompts as text; (word:1.3) and its kin are syntax otherwise",
    )
    add(
        "--clip-skip",
        type=int,
        default=1,
        metavar="N",
        help="2 leaves out the text encoder's last layer (default: %(default)s)",
    )
    add(
        "--sampler",
        default="ddim",
        metavar="NAME",
        help=f"one of {', '.join(SAMPLERS)} (default: %(default)s)",
    )
    add(
        "--schedule",
        metavar="NAME",
        help=f"one of {', '.join(SCHEDULES)} (default: the model's own)",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help=f"denoising steps (default: {STEPS}, or what a distilled model is made for)",
    )
    add(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="how closely to follow the text; 1 turns guidance off (default: "
        f"{GUIDANCE_SCALE}, or what a distilled model is made for)",
    )
    add("--height", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 (default: the model's own)")
    add("--seed", type=int, metavar="N", help="the same seed gives the same picture")
    add(
        "--num-images",
        type=int,
        default=1,
        metavar="N",
        help="pictures to draw, with seeds that count up (default: %(default)s)",
    )
    add("--image", type=Path, metavar="FILE", help="a picture to start from (image-to-image)")
    add(
        "--strength",
        type=float,
        metavar="X",
        help=f"how far to go from --image, above 0 and up to 1 (default: {STRENGTH})",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="a .png, .jpg or .webp; several pictures are numbered "
        "(default: the prompt and the seed)",
    )
    add("--graphs", type=Path, metavar="FOLDER", help="graphs that `python -m export` wrote")
    add(
        "--precision",
        choices=("float32", "float16"),
        default="float32",
        help="what the engines compute in (default: %(default)s)",
    )
    add("--threads", type=int, metavar="N", help="processor threads (default: one for each core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
