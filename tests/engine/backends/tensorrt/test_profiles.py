import json

import pytest

from engine.backends.tensorrt.profiles import REGISTERS, Profile, Range, input_shapes, parse_range
from engine.errors import BackendError
from engine.graphs.graph import Graph, signature
from engine.graphs.onnx_bytes import fields
from engine.graphs.steering import CONTROLLED_LEVELS
from engine.model import COMPONENTS, Model, find_model
from engine.shipped import GRAPHS
from export.published import published_parts
from runtime.samplers import SAMPLERS, program
from runtime.samplers.noise_schedule import NoiseSchedule

MODEL = Model.open(find_model("pictogram"))
PROFILE = Profile(
    height=Range(64, 128, 256),
    width=Range(128, 128, 128),
    batch=Range(1, 1, 4),
    tokens=Range(32, 32, 64),
)
SIZES = {"height": 128, "width": 128, "batch": 2, "tokens": 32, "groups": 1}


@pytest.mark.parametrize(
    ("text", "range_"),
    [
        ("512", Range(512, 512, 512)),
        ("512:1024", Range(512, 512, 1024)),
        ("512:768:1024", Range(512, 768, 1024)),
    ],
)
def test_ranges_are_read(text, range_):
    assert parse_range(text) == range_


@pytest.mark.parametrize(
    "text", ["", "a", "-1", "1:", "1:2:3:4", "2:1", "1:3:2", "512x512", "1.5", "²"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(BackendError, match=r"is no range.*512:768:1024"):
        parse_range(text)


def test_a_profile_comes_back_from_json():
    text = json.dumps(PROFILE.to_dict())
    assert Profile.from_dict(json.loads(text)) == PROFILE


@pytest.mark.parametrize(
    "values", [{}, {"height": 1}, {"height": [1, 1]}, {"heigth": [1, 1, 1]}, 3]
)
def test_what_is_no_profile_is_refused(values):
    with pytest.raises(BackendError, match="build the engine anew"):
        Profile.from_dict(values)


def test_a_profile_of_nothing_is_refused():
    with pytest.raises(BackendError, match="the profile's batch begins at 0"):
        Profile(height=Range(8, 8, 8), width=Range(8, 8, 8), batch=Range(0, 1, 1))


@pytest.mark.parametrize("name", list(SIZES))
def test_a_request_fits_until_one_size_is_too_large(name):
    assert PROFILE.fits(SIZES)
    assert not PROFILE.fits({**SIZES, name: 1000})
    assert PROFILE.fits({"height": 64})
    assert not PROFILE.fits({"height": 63})


def test_a_profile_says_what_it_allows():
    assert "128 × 64 to 256 pixels" in PROFILE.describe()
    assert "1 to 4 pictures" in PROFILE.describe()


def test_sizes_that_the_autoencoder_cannot_make_are_refused():
    profile = Profile(height=Range(512, 516, 520), width=Range(512, 512, 512))
    with pytest.raises(BackendError, match=r"height is 512:516:520 .* multiple of 8"):
        input_shapes("step", MODEL.unet, profile)


def test_the_shapes_of_a_step():
    shapes = input_shapes("step", MODEL.unet, PROFILE)
    assert shapes["registers"] == ((1, 1, 8, 8, 16), (1, 2, 8, 16, 16), (4, 7, 8, 32, 16))
    assert shapes["matrices"] == ((1, 1, 3), (1, 2, 4), (4, 7, 9))
    assert shapes["context"] == ((1, 1, 32, 192), (2, 1, 32, 192), (2, 4, 64, 192))
    assert shapes["mask"] == ((1, 1, 8, 16), (1, 1, 16, 16), (4, 1, 32, 16))


def test_a_text_encoder_reads_whole_rows():
    shapes = input_shapes("text_encoder", MODEL.config("text_encoder"), PROFILE)
    assert shapes["input_ids"] == ((1, 32), (2, 32), (32, 32))
    assert shapes["extra_embeddings"] == ((1, 192), (1, 192), (256, 192))


def test_the_shapes_of_pixels_are_those_of_the_latents():
    shapes = input_shapes("vae_encoder", MODEL.vae, PROFILE)
    assert shapes["pixels"] == ((1, 64, 128, 3), (1, 128, 128, 3), (4, 256, 128, 3))
    assert shapes["noise"] == ((1, 8, 8, 16), (1, 8, 16, 16), (4, 8, 32, 16))


def declared(graph):
    """Read the inputs' sizes off a graph: a number where it is fixed, None where not."""
    data = next(value for field, value in fields(graph.data()) if field == 7)
    found = {}
    for value in (dict(fields(value)) for field, value in fields(data) if field == 11):
        shape = dict(fields(dict(fields(value[2]))[1]))[2]
        dims = [dict(fields(dim)).get(1) for _, dim in fields(shape)]
        found[value[1].decode()] = dims
    return found


CONFIGS = [
    (part, config)
    for part, config in (
        *((part, MODEL.config(part)) for part, name in COMPONENTS.items() if name in MODEL.configs),
        *published_parts(),
    )
    # TensorRT builds none of these
    if part not in (*CONTROLLED_LEVELS, "control_hint", "step_shrunk")
    and "edited_image" not in config.extra_inputs
]


@pytest.mark.parametrize(("part", "config"), CONFIGS)
def test_what_a_graph_fixes_every_profile_has(part, config):
    [path] = GRAPHS.glob(f"{part}-{config.key()}-float32.onnx*")
    inputs = declared(Graph.read(path))
    shapes = input_shapes(part, config, PROFILE)
    assert list(shapes) == list(inputs) == list(signature(part, config).inputs)
    for name, dims in inputs.items():
        least, best, most = shapes[name]
        assert len(dims) == len(best)
        for dim, low, middle, high in zip(dims, least, best, most, strict=True):
            assert low <= middle <= high
            assert dim is None or dim == low == high, name


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_has_registers_enough_for_inpainting(sampler):
    noise = NoiseSchedule.from_config(MODEL.scheduler)
    assert program(sampler, noise, 12).matrices.shape[1] + 2 in REGISTERS
