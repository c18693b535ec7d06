from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.backends.memory_estimate import (
    MemoryEstimate,
    Needed,
    Sizes,
    activation_bytes,
    estimate,
    estimate_build,
    require_memory,
    weight_bytes,
)
from engine.checkpoints.families.sd import CLIP_L, SD1, SD2
from engine.checkpoints.families.xl import XL
from engine.configs.control_net import control_net_of
from engine.configs.diffusion import XL_SCALING_FACTOR, AutoencoderConfig, TinyDecoderConfig
from engine.configs.t2i_adapter import T2IAdapterConfig, feature_sum_of
from engine.errors import BackendError
from engine.graphs.graph import find_graph, graph_folders
from engine.graphs.t2i_adapter import feature_sum_graph
from tests.support.fake_cuda import FakeEngine
from tests.support.tolerances import ESTIMATED_ACTIVATIONS

VAE, XL_VAE = AutoencoderConfig(), AutoencoderConfig(scaling_factor=XL_SCALING_FACTOR)
GIB = 2**30


def graph_of(part, config):
    return find_graph(part, config, "float16", graph_folders(), Path("model"))


# "Total Activation Memory" of TensorRT-RTX 1.7.1's builder for sm89, of static shapes with two
# groups, 77 tokens and four registers; the attribute softmax_precision was taken out before.
@pytest.mark.parametrize(
    ("part", "config", "side", "batch", "planned"),
    [
        ("vae_decoder", VAE, 512, 1, 343847424),
        ("vae_decoder", VAE, 1024, 1, 1350480384),
        ("vae_decoder", XL_VAE, 1024, 1, 2692657664),
        ("step", SD1, 512, 1, 86750720),
        ("step", SD1, 512, 4, 313251840),
        ("step", SD1, 768, 1, 170299904),
        ("step", SD2, 768, 1, 173983232),
        ("step_shallow", SD1, 512, 1, 66126336),
    ],
)
def test_activations_are_about_what_a_builder_plans(part, config, side, batch, planned):
    sizes = Sizes(height=side, width=side, batch=batch)
    estimated = activation_bytes(graph_of(part, config), config, sizes)
    assert estimated == pytest.approx(planned, rel=ESTIMATED_ACTIVATIONS)


def test_weights_are_what_a_builder_counts():
    assert weight_bytes(graph_of("step", SD1)) == pytest.approx(1719043072, rel=1e-3)


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("text_encoder", CLIP_L),
        ("step", SD1),
        ("step", XL),
        ("step_shallow", XL),
        ("vae_decoder", VAE),
        ("vae_encoder", VAE),
        ("preview_decoder", TinyDecoderConfig()),
    ],
)
def test_every_part_has_an_estimate_that_grows_with_the_batch(part, config):
    graph = graph_of(part, config)
    one, four = (
        activation_bytes(graph, config, Sizes(height=512, width=768, batch=batch))
        for batch in (1, 4)
    )
    assert four == 4 * one > 0


def test_a_request_holds_all_weights_and_the_largest_activations():
    configs = {"text_encoder": CLIP_L, "step": SD1, "vae_decoder": VAE}
    graphs = {part: graph_of(part, config) for part, config in configs.items()}
    sizes = Sizes(height=512, width=512, batch=2, steps=20, registers=3)
    found = estimate(graphs, configs, sizes)
    assert found.weights == sum(
        2 * prod(shape) for graph in graphs.values() for shape in graph.weights.values()
    )
    decoding = activation_bytes(graphs["vae_decoder"], VAE, sizes)
    assert found.activations == decoding, "more than the step's"
    assert found.images == 2 * 512 * 512 * 3
    latent = 2 * 4 * 64 * 64
    deep, texts = 2 * 2 * 320 * 64 * 64, 2 * 2 * 77 * 768
    assert found.tables == 4 * (latent * (2 * 3 + 20) + deep + texts)
    said = estimate(graphs, configs, sizes, measured={"vae_decoder": 1, "step": 5 * GIB})
    assert said.activations == 5 * GIB
    alone = estimate({"vae_decoder": graphs["vae_decoder"]}, {"vae_decoder": VAE}, sizes)
    assert alone.tables == 0


def test_sessions_with_memory_of_their_own_are_added_up():
    """As counted on the stand-in: 202 MiB for a step, 360 for a decoder, 180 for its first run."""
    configs = {"step": SD1, "vae_decoder": VAE}
    graphs = {part: graph_of(part, config) for part, config in configs.items()}
    sizes = Sizes(height=512, width=512)
    shared, own = (estimate(graphs, configs, sizes, shared=each) for each in (True, False))
    assert own.activations == pytest.approx((202 + 360 + 180) * 2**20, rel=0.1)
    assert shared.activations == activation_bytes(graphs["vae_decoder"], VAE, sizes)
    assert own.total - own.activations == shared.total - shared.activations


def test_a_second_request_on_open_sessions_fits_where_the_first_did():
    graph, sizes = graph_of("step", SD1), Sizes(height=512, width=512)
    needed = estimate({"step": graph}, {"step": SD1}, sizes, shared=False)

    def require(free, engine=None):
        found = {"step": Needed(graph, SD1, engine)}
        require_memory(device(free), found, sizes, shared=False)

    def held(nbytes):
        engine = FakeEngine(None, None)
        engine.held = nbytes
        return engine

    def device(free):
        scratch = SimpleNamespace(nbytes=0)
        return SimpleNamespace(memory=lambda: (free, 80 * GIB), scratch=lambda nbytes: scratch)

    require(needed.total)
    with pytest.raises(BackendError, match="are missing"):
        require(needed.total - 1)
    left = needed.total - needed.weights - needed.activations
    require(left, held(needed.activations))
    with pytest.raises(BackendError, match="are missing"):
        require(left, held(needed.activations - 1))


def test_nets_beside_a_model_are_counted_with_what_they_add():
    """A ControlNet's own weights and residuals of 13 maps, a T2I-Adapter's features and sums."""
    net = control_net_of(SD1)
    steps = {"step_controlled": (graph_of("step_controlled", SD1), SD1)}
    control = {f"{part} canny": (graph_of(part, net), net) for part in ("control_hint", "control")}
    sizes = Sizes(height=512, width=512, batch=2)

    def estimated(parts):
        graphs = {name: graph for name, (graph, _) in parts.items()}
        configs = {name: config for name, (_, config) in parts.items()}
        return estimate(graphs, configs, sizes, shared=False)

    alone, steered = estimated(steps), estimated({**steps, **control})
    own = sum(prod(shape) for shape in net.tensor_shapes().values())
    assert steered.weights - alone.weights == 2 * own
    assert steered.activations > alone.activations
    hint = 2 * 320 * 64**2
    rows = 2 * 2
    assert steered.tables - alone.tables == 4 * 2 * (hint + rows * residuals(net, 64))
    assert alone.tables > 0
    adapter = T2IAdapterConfig(channels=(320, 640, 1280, 1280))
    summed = feature_sum_of(adapter)
    features = 320 * 64**2 + 640 * 32**2 + 1280 * 16**2 + 1280 * 8**2
    assert summed.tables(sizes) == (2 + 3 * rows) * features
    assert feature_sum_graph(summed).weights == {}


def residuals(net, side):
    """Count what a net adds for one row: SD 1.5's has 12 maps on the way down, and the middle's."""
    return sum(sum(w) * (side >> level) ** 2 for level, w in enumerate(net.residual_widths()))


def test_a_build_needs_its_weights_twice():
    graph = graph_of("step", SD1)
    sizes = Sizes(height=512, width=512)
    found = estimate_build(graph, SD1, sizes, workspace_bytes=GIB)
    assert found.weights == 2 * weight_bytes(graph)
    assert found.activations == activation_bytes(graph, SD1, sizes) + GIB
    assert found.total == found.weights + found.activations


def test_too_little_memory_is_said_with_how_much_is_missing():
    needed = MemoryEstimate(weights=2 * GIB, activations=GIB, tables=GIB // 4, images=GIB // 4)
    needed.require(needed.total)
    with pytest.raises(
        BackendError,
        match=r"the build takes about 3\.50 GiB of the device's memory \(weights 2\.00 GiB, "
        r"activations 1\.00 GiB, the rest 0\.50 GiB\) and 3\.00 GiB are free, so 0\.50 GiB are",
    ):
        needed.require(3 * GIB, "the build")
