from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.support.openvino_engines import MODEL, counted, opened, operations, step_inputs
from tests.support.parity import relative_error
from tests.support.tolerances import INT8_RTOL, OPENVINO_RTOL

if find_spec("openvino") is None:
    pytest.skip("openvino is not installed", allow_module_level=True)

from engine.backends.openvino.engine import OpenVinoEngine

GATES = [name for name in dict(MODEL.weights("step")) if name.endswith("ff.net.0.proj.weight")]
CUTTING = "Split"


def test_halves_of_a_product_are_two_products(monkeypatch):
    given = step_inputs(8, 8)
    whole = opened("step", "cpu").run(given)["next_registers"]
    parted = opened("step", "openvino")
    actual = parted.run(given)["next_registers"]
    assert relative_error(torch.from_numpy(actual), torch.from_numpy(whole)) < OPENVINO_RTOL
    monkeypatch.setattr("engine.backends.openvino.engine.part_gates", lambda library, model: None)
    plain = opened("step", "openvino")
    plain.run(given)
    assert counted(plain)[CUTTING] == len(GATES) > 0
    assert counted(parted)[CUTTING] == 0
    products = counted(parted)["FullyConnected"] - counted(plain)["FullyConnected"]
    assert products == len(GATES)


def test_both_halves_are_rounded():
    given = step_inputs(8, 8)
    engines = [
        opened("step", "cpu"),
        opened("step", "openvino", "int8", {GATES[0]: (-8.0, 8.0)}),
    ]
    exact, rounded = (torch.from_numpy(e.run(given)["next_registers"]) for e in engines)
    assert relative_error(rounded, exact) < INT8_RTOL
    products = [how for kind, how in operations(engines[1]) if kind.startswith("FullyConnected")]
    assert [how.endswith("i8") for how in products].count(True) == 2


def test_a_part_without_gates_stays(monkeypatch):
    called = []
    real = OpenVinoEngine._prepare
    monkeypatch.setattr(
        OpenVinoEngine,
        "_prepare",
        lambda self, model: (
            called.append(len(model.get_parameters())),
            real(self, model),
            called.append(len(model.get_parameters())),
        ),
    )
    engine = opened("vae_decoder", "openvino")
    engine.run({"latents": np.zeros((1, 8, 4, 4), np.float32)})
    assert called[0] == called[1]
