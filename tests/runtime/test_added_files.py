"""What is added to a model is used, or named: words, and adapters that distil to few steps."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.backends.settings import BackendSettings
from engine.engines import Engines
from engine.errors import ModelError, RequestError
from engine.model import Model, find_model
from runtime.__main__ import main
from runtime.conditioning.tokenizer import load_tokenizers
from runtime.pipeline import Pipeline
from runtime.request import Request

STYLE = "nice-style"
SMALL = {"height": 16, "width": 16, "num_inference_steps": 1, "seed": 0}


@pytest.fixture
def pipeline():
    return Pipeline.load("pictogram", settings=BackendSettings(backend="cpu", threads=1))


@pytest.fixture
def vectors(pipeline):
    width = pipeline.model.text_encoders["text_encoder"].hidden_size
    return np.random.default_rng(0).standard_normal((2, width)).astype("f4")


@pytest.fixture
def style(tmp_path, vectors):
    save_file({"emb_params": vectors}, tmp_path / f"{STYLE}.safetensors")
    return tmp_path / f"{STYLE}.safetensors"


@pytest.fixture
def stated(tmp_path, vectors):
    """The same vectors, in a file that states another word than its name."""
    (tmp_path / "stated").mkdir()
    save_file({"tok_v5-1000": vectors}, tmp_path / "stated" / f"{STYLE}.safetensors")
    return tmp_path / "stated" / f"{STYLE}.safetensors"


def drawn(pipeline, prompt):
    (image,) = pipeline(prompt, **SMALL).images
    return np.asarray(image).tolist()


def test_the_files_name_is_the_word_whatever_the_file_states(pipeline, style, stated):
    plain = drawn(pipeline, f"a cat, {STYLE}")
    pipeline.set_embeddings([style])
    expected = drawn(pipeline, f"a cat, {STYLE}")
    assert expected != plain
    pipeline.set_embeddings([stated])
    assert drawn(pipeline, f"a cat, {STYLE}") == expected
    assert drawn(pipeline, "a cat, tok_v5-1000") == expected
    pipeline.set_embeddings([f"{stated}=other"])
    assert drawn(pipeline, "a cat, other") == expected
    assert drawn(pipeline, f"a cat, {STYLE}") == plain
    pipeline.set_embeddings([])
    assert drawn(pipeline, f"a cat, {STYLE}") == plain


def test_a_word_that_is_a_token_is_taken_when_the_name_says_it(pipeline, tmp_path, vectors):
    plain = drawn(pipeline, "a cat")
    save_file({"cat": vectors}, tmp_path / f"{STYLE}.safetensors")
    pipeline.set_embeddings([tmp_path / f"{STYLE}.safetensors"])
    assert drawn(pipeline, "a cat") == plain
    assert any("states the word 'cat', which the model knows" in note for note in pipeline.notes)
    pipeline.set_embeddings([f"{tmp_path / STYLE}.safetensors=cat"])
    assert drawn(pipeline, "a cat") != plain


def test_a_word_that_the_prompt_lacks_is_said(pipeline, stated, capsys):
    pipeline.set_embeddings([stated])
    missing = f"the prompt holds no word of {stated}: write '{STYLE}' or 'tok_v5-1000'"
    assert missing in pipeline("a cat", **SMALL).notes
    for prompt, negative in ((f"a {STYLE} cat", ""), ("a cat", "TOK_v5-1000")):
        plan = pipeline.plan(Request(prompt=prompt, negative_prompt=negative, **SMALL))
        assert list(plan.notes) == []
    out = stated.with_suffix(".png")
    options = ["--steps", "1", "--height", "16", "--width", "16", "-o", str(out), "--seed", "1"]
    assert main(["a cat", "--embedding", str(stated), *options]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said.count(f"note: {missing}") == 1
    assert f"note: {stated} is meant by '{STYLE}' or 'tok_v5-1000'" in said


def test_two_files_of_one_name(pipeline, style, stated):
    with pytest.raises(RequestError, match=f"Two textual inversions mean the word '{STYLE}'"):
        pipeline.set_embeddings([style, stated])
    pipeline.set_embeddings([style, f"{stated}=other"])


def lora(pipeline, path, **more):
    shapes = pipeline.model.component("unet").shapes
    name = next(name for name in shapes if name.endswith("attn1.to_q.weight"))
    module, (rows, columns) = name.removesuffix(".weight"), shapes[name]
    random = np.random.default_rng(1)
    ends = {"lora_A": (2, columns), "lora_B": (rows, 2)}
    state = {f"unet.{module}.{e}.weight": random.standard_normal(s, "f4") for e, s in ends.items()}
    save_file(state | more, path)
    return path


def test_words_that_an_adapter_brings_come_and_go_with_it(pipeline, tmp_path, style, vectors):
    bundle = {f"bundle_emb.{STYLE}.string_to_param.*": vectors}
    with_words = lora(pipeline, tmp_path / "a.safetensors", **bundle)
    pipeline.set_loras([f"{with_words}:0"])
    bundled = drawn(pipeline, f"a cat, {STYLE}")
    pipeline.set_loras([])
    plain = drawn(pipeline, f"a cat, {STYLE}")
    pipeline.set_embeddings([style])
    assert bundled == drawn(pipeline, f"a cat, {STYLE}") != plain
    with pytest.raises(RequestError, match="Two textual inversions"):
        pipeline.set_loras([with_words])
    assert drawn(pipeline, f"a cat, {STYLE}") == bundled


def test_what_of_an_adapter_does_not_fit_is_said(pipeline, tmp_path):
    names = [f"unet.mid_block.{i}.lora_{end}.weight" for i in "a" for end in "AB"]
    whole = lora(pipeline, tmp_path / "whole.safetensors")
    more = lora(
        pipeline, tmp_path / "more.safetensors", **dict.fromkeys(names, np.ones((2, 2), "f4"))
    )
    with pytest.raises(ModelError, match="1 of its 2 modules fit"):
        pipeline.set_loras([more], strict=True)
    pipeline.set_loras([more])
    assert any("1 of the 2 modules of more.safetensors do not fit" in n for n in pipeline.notes)
    with_more = drawn(pipeline, "a cat")
    pipeline.set_loras([whole])
    assert drawn(pipeline, "a cat") == with_more
    assert not any("do not fit" in note for note in pipeline.notes)


class NoEngines(Engines):
    """Opens nothing: a plan of a published model is made of its texts' shapes alone."""

    def open(self, part, weights):
        raise AssertionError(part)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model of the original layout, which has a family with distilled forms."""
    from tests.support.original_layout import SMALL as CONFIGS
    from tests.support.original_layout import model_names, random_tensors

    folder = tmp_path_factory.mktemp("published")
    tensors = random_tensors(model_names(CONFIGS["sd1"]))
    save_file(tensors, folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("attn1.to_q.weight"))
    return folder, name.removesuffix(".weight"), tensors[name].shape


@pytest.mark.parametrize("name", ["LCM_LoRA_SD15", "Hyper-SD15-8steps-lora", "plain"])
def test_an_adapter_that_distils_says_what_is_drawn_with(published, tmp_path, name, monkeypatch):
    folder, module, (rows, columns) = published
    model = Model.read(find_model(folder / "model.safetensors"))
    monkeypatch.setattr("runtime.conditioning.tokenizer.check_tokenizers", lambda *_: None)
    engines = NoEngines(model, BackendSettings(backend="cpu"), "float32")
    pipeline = Pipeline(engines, load_tokenizers(model))
    flat = f"lora_unet_{module.removeprefix('model.diffusion_model.').replace('.', '_')}"
    ends = {"lora_down": (2, columns), "lora_up": (rows, 2)}
    path = tmp_path / f"{name}.safetensors"
    save_file({f"{flat}.{end}.weight": np.ones(shape, "f4") for end, shape in ends.items()}, path)
    before = pipeline.schedule.timestep_spacing
    pipeline.set_loras([path])
    said = [note for note in pipeline.notes if "distils to few steps" in note]
    assert len(said) == (name != "plain")
    expected = {"LCM_LoRA_SD15": "leading", "Hyper-SD15-8steps-lora": "trailing", "plain": before}
    assert pipeline.schedule.timestep_spacing == expected[name]
    pipeline.set_loras([])
    assert pipeline.schedule.timestep_spacing == before
    assert not any("distils" in note for note in pipeline.notes)
