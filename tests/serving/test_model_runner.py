"""The models that a server draws with, without HTTP."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline
from runtime.conditioning.wildcards import Wildcards
from runtime.images.credentials import Credentials, describe_credentials
from runtime.images.files import read_settings
from runtime.images.watermark import read_watermark
from serving.errors import BadRequestError
from serving.limits import Limits
from serving.model_memory import weight_bytes
from serving.model_runner import Models
from serving.picture_request import PictureRequest
from tests.support.certificates import write_certificates
from tests.support.named_requests import write_lora


@pytest.fixture
def models(tmp_path):
    """The model that ships, an adapter of it, and one of a wider model."""
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    wide = {f"{module}.lora_A.weight": (2, 640), f"{module}.lora_B.weight": (640, 2)}
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in wide.items()},
        tmp_path / "wide.safetensors",
    )
    return Models(
        models={"pictogram": "pictogram"},
        loras={"ink": write_lora(tmp_path), "wide": tmp_path / "wide.safetensors"},
        load=lambda path: Pipeline.load(path, settings=BackendSettings(backend="cpu", threads=1)),
        limits=Limits(),
    )


def asked(*loras, prompt="a red apple"):
    fields = {"prompt": prompt, "num_inference_steps": 1, "seed": 1}
    return PictureRequest(fields=fields, model="pictogram", loras=loras)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_file_is_signed_and_watermarked_when_the_operator_says(models, tmp_path, form):
    pytest.importorskip("c2pa")
    models.sign = Credentials.read(*write_certificates(tmp_path)).sign
    models.watermark = "SDV2"
    (unfinished,) = models.unfinished_pictures(replace(asked(), format=form))
    unfinished.enter()
    models.step([unfinished])
    finished, path = unfinished.finish(), tmp_path / "picture"
    path.write_bytes(finished.data)
    assert describe_credentials(path)["verified"] == "yes, nothing has changed since"
    with Image.open(path) as image:
        assert (image.format, read_watermark(image)) == (form, "SDV2")
    assert finished.settings["watermark"] == read_settings(path)["watermark"] == "SDV2"
    small = replace(asked(), fields={**asked().fields, "height": 32, "width": 32})
    with pytest.raises(RequestError, match="draw a larger one"):
        models.unfinished_pictures(small)


def test_an_adapter_of_another_model_is_refused_by_its_name_alone(models, tmp_path):
    with pytest.raises(RequestError, match="wide does not fit the model pictogram") as raised:
        models.unfinished_pictures(asked(("wide", 1.0)))
    assert str(tmp_path) not in str(raised.value)
    assert len(models.unfinished_pictures(asked(("ink", 1.0)))) == 1, "others are drawn with"


def test_models_stay_within_their_bytes(models):
    """Each set of adapters is a model of its own; those asked for longest ago go first."""
    pipelines = {}

    def use(*loras):
        (unfinished,) = models.unfinished_pictures(asked(*loras))
        pipelines[loras] = unfinished.pipeline
        return [key[1] for key in models._open]

    base, one, two = (), ("ink", 1.0), ("ink", 0.5)
    use()
    size = weight_bytes(pipelines[base])
    models.budget = int(2.5 * size)
    assert use(one) == [base, (one,)]
    assert use() == [(one,), base], "the last used is last"
    assert use(two) == [base, (two,)]
    kept = pipelines[base]
    use()
    assert pipelines[base] is kept, "nothing is loaded twice that fits"
    models.budget = 1
    assert use(one) == [(one,)], "what is asked for is drawn with whatever it takes"
    models.budget = None
    assert use(two) == [(one,), (two,)]


def drawn(models, picture_request):
    (unfinished,) = models.unfinished_pictures(picture_request)
    unfinished.enter()
    models.step([unfinished])
    picture = unfinished.finish()
    with Image.open(io.BytesIO(picture.data)) as file:
        return file.tobytes(), picture.settings


def test_an_adapter_that_a_prompt_names(models):
    named, settings = drawn(models, asked(prompt="a red apple<lora:Ink:0.7>"))
    given, _ = drawn(models, asked(("ink", 0.7)))
    plain, _ = drawn(models, asked())
    assert named == given != plain
    assert "notes" not in settings
    once, _ = drawn(models, asked(("ink", 0.7), prompt="a red apple<lora:ink:0.2>"))
    assert once == given, "what a field names is not put on once more"


def test_what_a_prompt_names_in_vain(models, tmp_path):
    told, settings = drawn(models, asked(prompt="a red apple<lora:gone:1><lora:../wide:1>"))
    plain, _ = drawn(models, asked())
    assert told == plain
    assert [note.split()[0] for note in settings["notes"]] == ["<lora:gone:1>", "<lora:../wide:1>"]
    assert str(tmp_path) not in str(settings)


def test_adapters_of_the_prompt_count_among_all():
    request = asked(("ink", 0.7), prompt="<lora:a:1>" * 8)
    with pytest.raises(BadRequestError, match="loras has 9 adapters"):
        request.checked(Limits())


def test_former_prompts_take_little_beside_the_weights(models):
    """Every prompt is another: the model's size bounds what is kept, with adapters or none."""
    for loras in ((), (("ink", 1.0),)):
        for number in range(60):
            fields = {"prompt": f"a {number}", "num_inference_steps": 1, "seed": 1}
            request = PictureRequest(fields=fields, model="pictogram", loras=loras)
            (unfinished,) = models.unfinished_pictures(request)
        cache, weights = unfinished.pipeline.encoder.cache, weight_bytes(unfinished.pipeline)
        assert 0 < cache._bytes <= cache.limit <= 0.02 * weights
        assert len(cache._arrays) < 60


def test_variation_seeds_are_drawn_once():
    fields = {"prompt": "a", "variation_strength": 0.2, "num_images_per_prompt": 2}
    drawn = PictureRequest(fields=fields, model="pictogram").checked(Limits()).fields
    assert drawn["seed"][0] == drawn["seed"][1]
    assert drawn["variation_seed"][1] == drawn["variation_seed"][0] + 1
    assert "variation_seed" not in asked().checked(Limits()).fields


def test_a_template_is_chosen_from_what_the_operator_gave(models, tmp_path):
    (tmp_path / "colour.txt").write_text("red\n")
    models.wildcards = Wildcards(tmp_path)
    _, settings = drawn(models, asked(prompt="a __colour__ apple __none__"))
    assert settings["prompt"] == "a red apple "
    assert settings["template"] == "a __colour__ apple __none__"
    assert "__none__ is left out" in settings["notes"][0]
