"""What a server checks of texts before a model is asked for anything."""

from engine.errors import RequestError
from runtime.conditioning.syntax import schedule
from runtime.conditioning.tokenizer import make_chunks
from runtime.pipeline import Pipeline
from runtime.request import Request
from serving.picture_request import DEFAULT_STEPS


def check_chunks(pipeline: Pipeline, request: Request, most: int) -> None:
    """Refuse texts that would keep the text encoder long: every version of each, in chunks.

    Raises RequestError.
    """
    prompts, _ = request.composed()
    texts = [text for group in prompts for text in group]
    texts += request.written(request.negative_prompts)
    steps = request.num_inference_steps or DEFAULT_STEPS
    versions = {version for text in texts for _, version in schedule(text, steps)}
    if len(versions) > most:
        raise RequestError(f"the prompt has {len(versions)} versions; up to {most} are taken")
    tokenizer = next(iter(pipeline.encoder.tokenizers.values()))
    longest = max(len(make_chunks(version, tokenizer)) for version in versions)
    if len(versions) * longest > most:
        raise RequestError(
            f"the prompts are {len(versions) * longest} chunks of 75 tokens, every version as long "
            f"as the longest; up to {most} are taken"
        )
