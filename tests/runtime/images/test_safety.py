"""The safety checker, against diffusers' StableDiffusionSafetyChecker with the same weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from engine.errors import ModelError, RequestError
from runtime.images.safety import SafetyChecker, blurred
from tests.support.safety_checkers import VISION, small_checker, write_checker
from tests.support.tolerances import SAFETY_EMBEDDING


def noise(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def inputs(image, side=VISION["image_size"]):
    """Return what CLIP's own processor makes of a picture, resized by PIL as it was trained on."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return torch.from_numpy(np.asarray(processor(image, return_tensors="np")["pixel_values"]))


def found_by_diffusers(checker, image):
    """Return whether diffusers flags a picture, and CLIP's embedding of it."""
    given = inputs(image)
    with torch.no_grad():
        pooled = checker.vision_model(given)[1]
        embedding = checker.visual_projection(pooled)[0].numpy()
    _, flagged = checker(images=[np.ones((4, 4, 3))], clip_input=given)
    return flagged[0], embedding


@pytest.mark.parametrize(
    "vision", [{}, {"hidden_act": "gelu"}, {"patch_size": 14, "num_attention_heads": 2}]
)
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (28, 28), (500, 29)])
def test_embeddings_are_diffusers(vision, size, tmp_path):
    checker = small_checker(**vision)
    ours = SafetyChecker.load(write_checker(tmp_path, checker))
    image = noise(*size)
    _, expected = found_by_diffusers(checker, image)
    difference = np.abs(ours._embedding(image) - expected).max() / np.abs(expected).max()
    assert difference < SAFETY_EMBEDDING


def test_flags_are_diffusers(tmp_path):
    """At every threshold, some special concepts among them."""
    seen = set()
    for i, threshold in enumerate(np.linspace(-0.2, 0.5, 8)):
        checker = small_checker(float(threshold))
        ours = SafetyChecker.load(write_checker(tmp_path / str(i), checker))
        for seed in range(3):
            image = noise(seed=seed)
            verdict = ours(image)
            assert verdict.is_flagged == found_by_diffusers(checker, image)[0]
            seen.add((verdict.is_flagged, bool(verdict.special)))
    assert {(True, True), (False, False)} <= seen


def test_a_special_concept_makes_it_stricter(tmp_path):
    checker, image = small_checker(), noise()
    _, embedding = found_by_diffusers(checker, image)
    unit = embedding / np.linalg.norm(embedding)
    concepts = checker.concept_embeds.detach().numpy()
    cosines = concepts @ unit / np.linalg.norm(concepts, axis=1)
    with torch.no_grad():
        checker.concept_embeds_weights.copy_(torch.from_numpy(cosines) + 0.005)
        checker.special_care_embeds_weights.fill_(2.0)
    calm = SafetyChecker.load(write_checker(tmp_path / "calm", checker))(image)
    with torch.no_grad():
        checker.special_care_embeds_weights.fill_(-2.0)
    strict = SafetyChecker.load(write_checker(tmp_path / "strict", checker))(image)
    assert (len(calm.concepts), len(calm.special)) == (0, 0)
    assert (len(strict.concepts), len(strict.special)) == (17, 3)
    assert found_by_diffusers(checker, image)[0]


def test_a_model_and_other_names_are_read(tmp_path):
    """The folder of a whole model; names of transformers with one word less or more."""
    checker = small_checker()
    folder = write_checker(tmp_path / "model" / "safety_checker", checker)
    expected = SafetyChecker.load(folder)(noise())
    assert SafetyChecker.load(tmp_path / "model")(noise()) == expected
    file = folder / "model.safetensors"
    state = load_file(file)
    state = {name.replace("vision_model." * 2, "vision_model."): t for name, t in state.items()}
    doubled = {
        name.replace("vision_model.", "vision_model." * 2): tensor for name, tensor in state.items()
    }
    positions = torch.arange(17)[None]
    for names in (state, doubled):
        prefix = "vision_model." * (2 if names is doubled else 1)
        save_file({**names, f"{prefix}embeddings.position_ids": positions}, file)
        assert SafetyChecker.load(folder)(noise()) == expected


def test_old_configurations(tmp_path):
    """Those of before 2023 have the vision part twice."""
    checker = small_checker()
    vision = {**VISION, "hidden_size": 1}
    folder = write_checker(tmp_path, checker, vision_config=vision, vision_config_dict=VISION)
    assert SafetyChecker.load(folder).file.config.hidden_size == VISION["hidden_size"]


def without(state, name):
    return {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: without(s, "concept_embeds"), "lacks concept_embeds, so it is no safety"),
        (lambda s: without(s, "visual_projection.weight"), "lacks visual_projection.weight"),
        (lambda s: {**s, "more": torch.zeros(1)}, "holds more, for which its"),
        (lambda s: {**s, "concept_embeds": torch.zeros(17, 5)}, r"concept_embeds has the shape"),
        (lambda s: {**s, "concept_embeds": torch.zeros(17)}, "2 axes of floats"),
        (
            lambda s: {**s, "concept_embeds_weights": torch.zeros(17, dtype=torch.int64)},
            "1 axes of floats",
        ),
        (
            lambda s: {**s, "special_care_embeds_weights": torch.full((3,), float("nan"))},
            "not finite",
        ),
        (lambda s: {**s, "visual_projection.weight": torch.zeros(3, 3)}, "has shape"),
    ],
)
def test_what_is_damaged_is_said(tmp_path, change, said):
    folder = write_checker(tmp_path, small_checker())
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        SafetyChecker.load(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["CLIPModel"]}, r"\['CLIPModel'\]; give the folder 'safety_checker'"),
        ({"vision_config": 3}, "an object is expected"),
        ({"vision_config": {**VISION, "hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": {**VISION, "num_attention_heads": 5}}, "not a multiple"),
        ({"vision_config": {**VISION, "patch_size": 99}}, "larger than image_size"),
        ({"vision_config": {**VISION, "hidden_size": "x"}}, "hidden_size is 'x'"),
        ({"vision_config": {**VISION, "num_hidden_layers": 3}}, "lacks vision_model"),
        ({"vision_config": {**VISION, "num_hidden_layers": 1}}, "for which its config.json"),
    ],
)
def test_what_is_no_checker(tmp_path, config, said):
    folder = write_checker(tmp_path, small_checker(), **config)
    with pytest.raises(ModelError, match=said):
        SafetyChecker.load(folder)


def test_folders_without_one(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config.json; give the folder 'safety_checker'"):
        SafetyChecker.load(tmp_path)
    with pytest.raises(ModelError, match=r"holds no config.json"):
        SafetyChecker.load(tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": VISION}))
    with pytest.raises(ModelError, match="holds no weights"):
        SafetyChecker.load(tmp_path)


def test_what_is_no_picture(tmp_path):
    checker = SafetyChecker.load(write_checker(tmp_path, small_checker()))
    with pytest.raises(RequestError, match="image came as str"):
        checker("a.png")
    assert (
        checker(Image.new("RGBA", (1, 300))).special == checker(Image.new("RGBA", (1, 300))).special
    )


def test_blurring_leaves_colours_and_places():
    image = Image.new("RGB", (120, 60), "red")
    image.paste("blue", (60, 0, 120, 60))
    image.info["kept"] = 1
    for x in range(0, 120, 2):
        image.paste("white", (x, 0, x + 1, 60))
    seen = np.asarray(blurred(image), np.float32)
    assert blurred(image).info == {"kept": 1}
    assert np.abs(np.diff(seen, axis=1)).max() < 12
    assert seen[30, 10, 0] > seen[30, 10, 2] + 50
    assert seen[30, 110, 2] > seen[30, 110, 0] + 50
