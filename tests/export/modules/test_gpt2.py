import pytest
import torch
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2LMHeadModel

from engine.backends.settings import BackendSettings
from engine.checkpoints.gpt2 import LanguageModel
from engine.configs.gpt2 import GPT2Config
from engine.engines import open_engine
from engine.graphs.graph import find_graph
from export.__main__ import main
from export.modules.gpt2 import GPT2
from export.parity import TOLERANCES
from export.parity import relative_error as array_error
from tests.support.language_models import SMALL, small_gpt2, write_folder
from tests.support.parity import relative_error
from tests.support.tolerances import LOGITS_RTOL
from tests.support.traced import trace_once

KINDS = {
    "base": {},
    "gelu": {"activation_function": "gelu"},
    "tanh-gelu": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "narrow-mlp": {"n_inner": 40},
    "named-mlp": {"n_inner": 4 * SMALL["n_embd"]},
    "wide-epsilon": {"layer_norm_epsilon": 1e-2},
    "unscaled": {"scale_attn_weights": False},
    "scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True},
    "one-layer": {"n_layer": 1},
    "own-head": {"tie_word_embeddings": False},
}


def pair(**changes):
    reference = small_gpt2(**changes)
    config = GPT2Config.from_dict(reference.config.to_dict())
    module = GPT2(config)
    state = reference.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    module.load_state_dict(state, strict=True)
    return reference, module.eval()


def nothing(config, batch):
    return torch.zeros(config.n_layer, 2, batch, config.n_head, 0, config.head_width)


def keys_and_values(cache):
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_agrees_with_transformers_with_and_without_the_past(kind):
    reference, module = pair(**kind)
    ids = torch.randint(SMALL["vocab_size"], (2, 9))
    logits, whole = module(ids, nothing(module.config, 2))
    expected = reference(ids, use_cache=True)
    assert relative_error(logits, expected.logits[:, -1]) < LOGITS_RTOL
    assert relative_error(whole, keys_and_values(expected.past_key_values)) < LOGITS_RTOL
    _, past = module(ids[:, :5], nothing(module.config, 2))
    for new in (ids[:, 5:8], ids[:, 8:]):
        logits, past = module(new, past)
    assert relative_error(logits, expected.logits[:, -1]) < LOGITS_RTOL
    assert relative_error(past, whole) < LOGITS_RTOL


def test_names_and_shapes_of_the_real_size():
    with torch.device("meta"):
        reference = GPT2LMHeadModel(ReferenceConfig())
    expected = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    del expected["lm_head.weight"]
    assert GPT2Config().tensor_shapes() == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("gpt2"), small_gpt2())


@torch.no_grad()
def test_the_graph_agrees_with_transformers(folder, tmp_path, capsys, monkeypatch):
    """One session does the whole prompt without a past, and single tokens with one."""
    monkeypatch.setattr("export.writing.trace", trace_once)
    assert main(["language-model", str(folder), "--out", str(tmp_path)]) == 0
    assert "relative error" in capsys.readouterr().out
    model = LanguageModel.open(folder)
    graph = find_graph("language_model", model.config, "float32", [tmp_path], folder)
    assert dict(graph.weights) == model.config.tensor_shapes()
    engine = open_engine(graph, model.weights, BackendSettings(threads=1))
    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    for batch in (1, 3):
        ids = torch.randint(SMALL["vocab_size"], (batch, SMALL["n_positions"]))
        expected = reference(ids).logits
        past = nothing(model.config, batch).numpy()
        done = 0
        for new in (1, 20, *(1,) * 43):
            given = engine.run({"input_ids": ids[:, done : done + new].numpy(), "past": past})
            past, done = given["present"], done + new
            assert array_error(given["logits"], expected[:, done - 1].numpy()) < LOGITS_RTOL
        assert past.shape[-2] == done == SMALL["n_positions"]


@torch.no_grad()
def test_the_float16_graph_is_near(folder, tmp_path):
    command = ["language-model", str(folder), "--precision", "float16", "--out", str(tmp_path)]
    assert main(command) == 0
    model = LanguageModel.open(folder)
    graph = find_graph("language_model", model.config, "float16", [tmp_path], folder)
    engine = open_engine(graph, model.weights, BackendSettings(threads=1))
    ids = torch.randint(SMALL["vocab_size"], (1, 12))
    past = nothing(model.config, 1).numpy()
    given = engine.run({"input_ids": ids.numpy(), "past": past})
    expected = GPT2LMHeadModel.from_pretrained(folder).eval()(ids).logits[:, -1].numpy()
    assert 0 < array_error(given["logits"], expected) < TOLERANCES["float16"]
    assert given["logits"].dtype == given["present"].dtype == "float32"


def test_a_folder_that_is_none_gets_one_sentence(tmp_path, capsys):
    assert main(["language-model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds no config.json" in error
    assert error.count("\n") == 1


@pytest.mark.slow
@torch.no_grad()
def test_the_real_size(tmp_path):
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(ReferenceConfig()).eval()
    write_folder(tmp_path, reference)
    assert main(["language-model", str(tmp_path), "--out", str(tmp_path)]) == 0
    model = LanguageModel.open(tmp_path)
    graph = find_graph("language_model", model.config, "float32", [tmp_path], tmp_path)
    engine = open_engine(graph, model.weights, BackendSettings(threads=1))
    ids = torch.randint(model.config.vocab_size, (1, 40))
    expected = reference(ids).logits.numpy()
    past = nothing(model.config, 1).numpy()
    done = 0
    for new in (30, *(1,) * 10):
        given = engine.run({"input_ids": ids[:, done : done + new].numpy(), "past": past})
        past, done = given["present"], done + new
        assert array_error(given["logits"], expected[:, done - 1]) < LOGITS_RTOL
