"""The models that a server draws with, without HTTP."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from runtime import Pipeline
from serving.limits import Limits
from serving.model_memory import weight_bytes
from serving.model_runner import Models
from serving.picture_request import PictureRequest
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


def asked(*loras):
    fields = {"prompt": "a red apple", "num_inference_steps": 1, "seed": 1}
    return PictureRequest(fields=fields, model="pictogram", loras=loras)


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
