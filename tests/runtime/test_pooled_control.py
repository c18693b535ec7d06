"""ControlNets whose residuals count in the mean, as lllyasviel's "shuffle", against diffusers."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoints.control_net import is_pooled
from runtime import Control, Pipeline, Request
from tests.support.controls import small_control_net, trace_control_graphs, write_control_net
from tests.support.pictures import psnr
from tests.support.small_models import SMALL
from tests.support.small_pictures import DEPRECATIONS, HINT, PIXELS, PROMPT, SETTINGS, write_small
from tests.support.tolerances import SMALL_PICTURE_PSNR_DB

pytestmark = DEPRECATIONS
FIELDS = {"negative_prompt": "blurry", "num_inference_steps": 4, "height": PIXELS, "width": PIXELS}


@pytest.fixture(scope="module")
def loaded(place):
    """Open a small model with a net as a folder, as a file that its name tells, and as another."""
    small, model, graphs = write_small("sd1", place)
    net = small_control_net(small)
    net.register_to_config(global_pool_conditions=True)
    files = {"folder": write_control_net(net, place / "folder")}
    for stem in ("control_v11e_sd15_shuffle_fp16", "reshuffled"):
        files[stem] = place / f"{stem}.safetensors"
        save_file(net.state_dict(), files[stem])
    pipeline = Pipeline.load(model, graphs=graphs, settings=SETTINGS, controls=files)
    trace_control_graphs(pipeline, graphs)
    return pipeline, net, files


def draw(pipeline, *controls, **fields):
    fields = {"sampler": "ddim", "seed": 3, "guidance_scale": 5.0, **FIELDS, **fields}
    return pipeline(PROMPT, controls=controls, **fields).images[0]


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_pictures_are_diffusers_own(loaded, guidance_scale):
    pipeline, net, _ = loaded
    own = SMALL["sd1"].reference
    theirs = diffusers.StableDiffusionControlNetPipeline(
        **own.components, controlnet=net, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    picture = theirs(
        PROMPT,
        image=HINT,
        generator=torch.Generator().manual_seed(3),
        controlnet_conditioning_scale=0.8,
        guidance_scale=guidance_scale,
        **FIELDS,
    ).images[0]
    for name in ("folder", "control_v11e_sd15_shuffle_fp16"):
        control = Control(net=name, image=HINT, weight=0.8)
        ours = draw(pipeline, control, guidance_scale=guidance_scale)
        assert psnr(ours, picture) >= SMALL_PICTURE_PSNR_DB
    control = Control(net="reshuffled", image=HINT, weight=0.8)
    assert psnr(draw(pipeline, control, guidance_scale=guidance_scale), picture) < 50


def test_beside_others_they_add_theirs(loaded):
    """In either order, alone and in rows of one call."""
    pipeline, *_ = loaded
    pooled = Control(net="folder", image=HINT, weight=0.5)
    other = Control(net="reshuffled", image=HINT.transpose(0), weight=0.5)
    lists = [(pooled, other), (other, pooled), (other,), ()]
    fields = {**FIELDS, "sampler": "ddim", "guidance_scale": 5.0}
    requests = [Request(prompt=PROMPT, seed=3, controls=controls, **fields) for controls in lists]
    together = {drawn.request: drawn.image for drawn in pipeline.draw(requests, batch_size=4)}
    alone = [draw(pipeline, *controls) for controls in lists]
    for index, picture in enumerate(alone):
        assert np.array_equal(np.asarray(together[index]), np.asarray(picture))
    assert psnr(alone[0], alone[1]) >= SMALL_PICTURE_PSNR_DB
    assert psnr(alone[0], alone[2]) < SMALL_PICTURE_PSNR_DB


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("control_v11e_sd15_shuffle.pth", True),
        ("Shuffle.safetensors", True),
        ("sd15 shuffle v2.safetensors", True),
        ("reshuffled.safetensors", False),
        ("control_v11p_sd15_canny.pth", False),
    ],
)
def test_a_file_is_told_by_its_name(name, expected, tmp_path):
    (tmp_path / name).touch()
    assert is_pooled(tmp_path / name) == expected
    assert not is_pooled(tmp_path), "a folder without a configuration"
