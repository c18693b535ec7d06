"""What a family touches: one made here is recognised, read, planned and sized as the others are."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from engine.backends.memory_estimate import Sizes, activation_bytes
from engine.backends.tensorrt.profiles import Profile, Range, input_shapes
from engine.checkpoints.component import Source, assemble
from engine.checkpoints.families import FAMILIES
from engine.checkpoints.families.base import SCHEDULE, Family, Presets, choice, has
from engine.checkpoints.families.variants import LCM
from engine.checkpoints.formats.files import open_weights
from engine.checkpoints.parts import autoencoder, clip, unet
from engine.configs.base import Config, weight
from engine.graphs.graph import SIGNATURES, graph_name, signature
from engine.model import Model
from export.published import published_parts
from runtime.presets import PRESETS, preset
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule
from tests.support import original_layout as original

PLACE = ("reader.",)
UNET = original.SMALL["sd1"].unet
TOY = Family(
    name="toy",
    title="Toy Diffusion",
    recognises=lambda file: has(file, PLACE),
    unet=MappingProxyType({"addition_embed_type": None, "cross_attention_dim": 64}),
    parts=MappingProxyType(
        {"text_encoder": clip(PLACE), "unet": unet(linear=False), "vae": autoencoder(0.5)}
    ),
    pipelines=("ToyDiffusion",),
    context="penultimate_hidden_state",
    zeros_for_empty_prompt=True,
    scheduler=MappingProxyType({"_class_name": "EulerDiscreteScheduler", **SCHEDULE}),
    prediction_type="v_prediction",
    sample_size=12,
    v_sample_size=24,
    scaling_factor=0.5,
    presets=Presets(
        title="Toy Diffusion",
        fast=choice(3, 2.0),
        balanced=choice(6, 2.0),
        quality=choice(9, 2.0),
        creative=choice(6, 1.5, "euler_a"),
    ),
    variants=(LCM,),
)


@pytest.fixture
def listed(monkeypatch):
    """List the family, which is the one line that is not in its own file."""
    monkeypatch.setattr("engine.checkpoints.families.FAMILIES", {"toy": TOY, **FAMILIES})


@pytest.fixture
def file(tmp_path):
    """A small Stable Diffusion whose text encoder is at the family's place."""
    names = original.model_names(original.SMALL["sd1"])
    theirs = "cond_stage_model.transformer.text_model."
    assert any(name.startswith(theirs) for name in names)
    ours = {name.replace(theirs, PLACE[0]): shape for name, shape in names.items()}
    return original.write_sparse(tmp_path / "toy.safetensors", ours)


def test_a_file_is_recognised_and_read(listed, file):
    model = Model.open(file)
    assert model.family is TOY
    assert model.notes[0] == "toy.safetensors is of the family Toy Diffusion"
    assert list(model.configs) == ["text_encoder", "unet", "vae"]
    assert (model.unet.cross_attention_dim, model.vae.scaling_factor) == (64, 0.5)
    for name, config in model.configs.items():
        assert dict(model.component(name).shapes) == config.tensor_shapes()
    assert model.component("text_encoder").sources["text_model.final_layer_norm.bias"] == Source(
        name="reader.final_layer_norm.bias"
    )


def test_it_brings_its_schedule_sizes_and_presets(listed, file):
    model = Model.open(file)
    assert model.scheduler == {**TOY.scheduler, "prediction_type": "v_prediction"}
    assert (model.sample_size, model.zeros_for_empty_prompt) == (24, True)
    assert Model.open(file, prediction_type="epsilon").sample_size == 12
    for name in PRESETS:
        chosen = preset(name, model)
        assert chosen == getattr(TOY.presets, name)
        schedule = NoiseSchedule.from_config(model.scheduler)
        steps = program(chosen.sampler, schedule, chosen.num_inference_steps)
        assert len(steps.timesteps) == chosen.num_inference_steps


@pytest.mark.parametrize(("stem", "variant"), [("toy_lcm", LCM), ("toy_lightning", None)])
def test_it_has_its_own_distilled_forms(stem, variant, listed, file):
    model = Model.open(file.rename(file.with_stem(stem)))
    assert model.variant is variant
    assert model.steps == (8 if variant else None)


def test_an_autoencoder_of_its_own_has_its_scaling_factor(listed, file, tmp_path):
    names = original.autoencoder_names(original.SMALL["sd1"].vae)
    vae = original.write_sparse(tmp_path / "vae.safetensors", names)
    assert Model.open(file, vae=vae).vae.scaling_factor == TOY.scaling_factor


def test_a_file_without_its_mark_is_none_of_it(listed, tmp_path):
    names = original.model_names(original.SMALL["sd1"])
    model = Model.open(original.write_sparse(tmp_path / "other.safetensors", names))
    assert model.family is FAMILIES["sd1"]


def test_what_it_publishes_gets_graphs(listed, file, monkeypatch):
    config = Model.open(file).unet
    published = replace(TOY, published={"unet": (config, config)})
    monkeypatch.setattr("export.published.FAMILIES", {"toy": published})
    assert list(published_parts())[:2] == [("step", config), ("step_shallow", config)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchesConfig(Config):
    """A decoder of one linear layer; every latent value stands for 16 × 16 pixels."""

    latent_channels: int = 3

    @property
    def compression(self):
        return 16

    @property
    def overflows_float16(self):
        return True

    def tensor_shapes(self):
        return dict(weight("proj", 3 * self.compression**2, self.latent_channels))

    def symbols(self):
        return {"C": self.latent_channels}

    def activations(self, part, sizes):
        return 3 * sizes.pixels


def test_a_new_architecture_is_one_class(tmp_path):
    config, part = PatchesConfig.from_dict({"latent_channels": 5, "other": 1}), "vae_decoder"
    assert graph_name(part, config, "float32") == f"{part}-{config.key()}-float32.onnx"
    assert config.key() != PatchesConfig().key()
    assert signature(part, config) == SIGNATURES[part]

    profile = Profile(height=Range(64, 64, 64), width=Range(64, 128, 128))
    shapes = input_shapes(part, config, profile, compression=config.compression)
    assert shapes == {"latents": ((1, 5, 4, 4), (1, 5, 4, 8), (1, 5, 4, 8))}

    graph = SimpleNamespace(part=part, precision="float16")
    assert activation_bytes(graph, config, Sizes(height=64, width=32)) == 4 * 3 * 64 * 32

    names = {"proj.weight": (768, 5), "proj.bias": (768,)}
    path = original.write_sparse(Path(tmp_path) / "decoder.safetensors", names)
    sources = {name: Source(name=name) for name in config.tensor_shapes()}
    found = assemble(path, open_weights(path), config, sources)
    assert {name: array.shape for name, array in found.items()} == names
