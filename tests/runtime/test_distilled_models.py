"""Models with fewer blocks and a tiny autoencoder, from folders, against diffusers' pipelines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from engine.backends.settings import BackendSettings
from engine.model import Model
from runtime import Pipeline
from tests.support.pictures import drawing, psnr
from tests.support.small_models import SMALL, TRAILING, trace_graphs, trained
from tests.support.tolerances import PICTURE_PSNR_DB

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PIXELS, PROMPT = 64, "a lighthouse at dusk"
FIELDS = {"height": PIXELS, "width": PIXELS, "num_inference_steps": 1, "guidance_scale": 1.0}


def random_numbers(module, seed):
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    module.load_state_dict(trained(shapes, seed))
    return module.eval()


@pytest.fixture(scope="module")
def sdxs(tmp_path_factory):
    """Make a small SDXS-512: no middle, no attention at the first level, a tiny autoencoder."""
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=[1, 2],
    )
    base = SMALL["sd1"].reference
    pipeline = StableDiffusionPipeline(
        unet=random_numbers(unet, 5),
        vae=random_numbers(AutoencoderTiny(), 6),
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        scheduler=EulerDiscreteScheduler.from_config(dict(TRAILING)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    folder = Path(tmp_path_factory.mktemp("sdxs"))
    pipeline.save_pretrained(folder / "model")
    trace_graphs(Model.open(folder / "model"), folder)
    ours = Pipeline.load(folder / "model", graphs=folder, settings=BackendSettings(threads=1))
    return pipeline, ours


def test_a_picture_of_one_step_is_that_of_diffusers(sdxs):
    reference, ours = sdxs
    generator = torch.Generator().manual_seed(3)
    expected = reference(PROMPT, generator=generator, **FIELDS).images[0]
    drawn = ours(PROMPT, seed=3, sampler="euler", **FIELDS).images[0]
    assert np.asarray(expected).std() > 10
    assert psnr(drawn, expected) >= PICTURE_PSNR_DB
    assert psnr(ours(PROMPT, seed=4, sampler="euler", **FIELDS).images[0], expected) < 30


def test_a_picture_from_a_picture_draws_no_posterior(sdxs):
    reference, ours = sdxs
    image = drawing(PIXELS, PIXELS)
    pipeline = StableDiffusionImg2ImgPipeline(**reference.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    fields = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5}
    generator = torch.Generator().manual_seed(3)
    expected = pipeline(PROMPT, image=image, generator=generator, **fields).images[0]
    drawn = ours(PROMPT, image=image, seed=3, sampler="euler", **fields).images[0]
    assert psnr(drawn, expected) >= PICTURE_PSNR_DB
