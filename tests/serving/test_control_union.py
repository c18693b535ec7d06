"""Types of controls in a server: as its APIs take them, and as they come to a union."""

import io
import tempfile
from base64 import b64encode
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.backends.settings import BackendSettings
from engine.errors import RequestError
from engine.model import Model
from runtime import Control, Pipeline
from serving.errors import BadRequestError
from serving.frames import of_order, to_order
from serving.http.automatic1111.controlnet import steering_of
from serving.http.automatic1111.fields import TextBody
from serving.http.bodies import Picture
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.model_memory import weight_bytes
from serving.model_runner import Models
from serving.order import Order
from serving.picture_request import PictureRequest
from serving.steering import ControlRequest
from tests.support.control_unions import small_union, write_union
from tests.support.controls import trace_control_graphs
from tests.support.pictures import drawing
from tests.support.small_models import SIDE, SMALL, trace_graphs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PIXELS = 8 * SIDE
PICTURE = drawing(PIXELS, PIXELS)
FILE = io.BytesIO()
PICTURE.save(FILE, "PNG")
DATA = FILE.getvalue()
CATALOG = Catalog(models=("small",), loras=(), controls=("union",))


def test_every_api_takes_a_type_and_it_crosses_to_the_engines_process():
    given = {"name": "union", "picture": b64encode(DATA).decode(), "type": "depth"}
    body = Picture.model_validate({"prompt": "a", "controls": [given, {**given, "type": None}]})
    controls = CATALOG.steering(body)["controls"]
    assert [each.type for each in controls] == ["depth", None]
    request = PictureRequest(fields={"prompt": "a"}, model="small", controls=controls)
    crossed = to_order(*of_order(Order(job="1", picture_request=request))).picture_request
    assert crossed.controls == controls
    assert [each.control().type for each in crossed.controls] == ["depth", None]


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ({}, None),
        ({"union_control_type": "Unknown"}, None),
        ({"union_control_type": "OpenPose"}, "openpose"),
        ({"union_control_type": "Soft Edge"}, "scribble"),
        ({"union_control_type": "Hard Edge"}, "canny"),
        ({"union_control_type": "Segmentation"}, "segment"),
        ({"union_control_type": "Inpaint"}, "repaint"),
    ],
)
def test_automatic1111s_names_of_types(said, ours):
    unit = {"model": "union", "image": b64encode(DATA).decode(), "resize_mode": 0, **said}
    body = TextBody(alwayson_scripts={"controlnet": {"args": [unit]}})
    (control,) = steering_of(body, CATALOG, Limits(), None, None)["controls"]
    assert control.type == ours
    unit["union_control_type"] = "Edges"
    with pytest.raises(BadRequestError, match="union_control_type 'Edges'; choose one of OpenPose"):
        steering_of(body, CATALOG, Limits(), None, None)


def test_a_server_draws_with_a_union_that_it_has_once():
    with tempfile.TemporaryDirectory() as name:
        place, graphs = Path(name), Path(name) / "graphs"
        graphs.mkdir()
        file, union = SMALL["xl"].write_file(place), write_union(small_union(), place / "u.bin")
        trace_graphs(Model.open(file), graphs)
        settings = BackendSettings(backend="cpu", threads=1)
        load = partial(Pipeline.load, graphs=graphs, settings=settings)
        nets = {"union": union, "again": union}
        models = Models(models={"small": file}, loras={}, controls=nets, load=load, limits=Limits())
        pipeline = load(file, controls={"union": union})
        trace_control_graphs(pipeline, graphs)
        fields = {"prompt": "a", "seed": 1, "num_inference_steps": 2, "guidance_scale": 5.0}
        fields |= {"sampler": "ddim", "height": PIXELS, "width": PIXELS}

        def begun(net, **said):
            control = ControlRequest(net=net, picture=DATA, **said)
            request = PictureRequest(fields=fields, model="small", controls=[control])
            (picture,) = models.unfinished_pictures(request)
            return picture

        rows = [begun("union", type="depth"), begun("again", preprocessor="canny")]
        assert rows[0].pipeline.control_nets.names == ("union", "again")
        assert weight_bytes(rows[0].pipeline) == weight_bytes(pipeline)
        with pytest.raises(RequestError, match="nothing tells what its picture is"):
            begun("union")
        for row in rows:
            row.enter()
        for _ in range(2):
            models.step(rows)
        given = ({"type": "depth"}, {"type": "canny", "preprocessor": "canny"})
        for row, said in zip(rows, given, strict=True):
            control = Control(net="union", image=PICTURE, **said)
            (image,) = pipeline(controls=[control], **fields).images
            finished = Image.open(io.BytesIO(row.finish().data)).convert("RGB")
            assert np.array_equal(np.asarray(finished), np.asarray(image))
