"""The server on a Ray cluster, of deploy/ray.yaml: nothing is lost, whoever dies or is replaced."""

import base64
import hashlib
import io
import os
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from ray import serve
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

from tests.support.ray_processes import titled
from tests.support.servers import load

pytestmark = pytest.mark.filterwarnings("default")  # of Ray's own code
DEPLOY = Path(__file__).parents[2] / "deploy"
ENGINES, GATEWAYS = "ServeReplica:latentrt:Engine", "ServeReplica:latentrt:Gateway"
REQUESTS = [
    {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "sampler": sampler}
    for seed, (prompt, steps, sampler) in enumerate(
        [
            ("a red apple", 24, "euler_a"),
            ("a blue hat", 30, "dpmpp_2m"),
            ("a cat", 40, "ddim"),
            ("a castle", 18, "euler"),
        ]
    )
]
QUEUE = 24
LONG = 300  # seconds that a busy machine has for anything


def digest(image):
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


@pytest.fixture(scope="module")
def alone():
    """Return the hash of each request's picture, drawn by itself."""
    with load("pictogram") as pipeline:
        sides = {"height": 128, "width": 128}
        return [digest(pipeline(**fields, **sides).images[0]) for fields in REQUESTS]


class Served:
    """The application as it runs: it can be asked, and deployed again with other options."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._client = None

    def deploy(self, scaling=None, **args):
        """Deploy what deploy/ray.yaml says, with two engines, and wait until that runs.

        scaling: in place of that, how their number is to change
        """
        config = yaml.safe_load((DEPLOY / "ray.yaml").read_text())
        config["http_options"]["port"] = self.port
        (app,) = config["applications"]
        app["args"] |= {"threads": 1, "backend": "cpu", "max-queue": QUEUE, **args}
        for deployment in app["deployments"]:
            if deployment["name"] == "Engine":
                deployment["ray_actor_options"] = {"num_cpus": 1}
                if scaling is None:
                    del deployment["autoscaling_config"]
                    deployment["num_replicas"] = 2
                else:
                    deployment["autoscaling_config"] |= scaling
        read = ServeDeploySchema.model_validate(config)
        self._client = self._client or serve_start(http_options=config["http_options"])
        self._client.deploy_apps(read)
        end = time.monotonic() + LONG
        while serve.status().applications["latentrt"].status != "RUNNING":
            assert time.monotonic() < end, serve.status()
            time.sleep(0.1)

    def draw(self, fields):
        """Return the answer to a request for a picture."""
        body = {"response_format": "b64_json", "size": "128x128", **fields}
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=300)

    def replicas(self, title=ENGINES, count=2):
        """Return the pids of a deployment, once there are as many as there should be."""
        end = time.monotonic() + LONG
        while len(found := titled(title)) != count:
            assert time.monotonic() < end, found
            time.sleep(0.05)
        return found

    def wait_running(self):
        """Wait until Ray Serve says that all replicas run."""
        end = time.monotonic() + LONG
        while True:
            status = serve.status().applications["latentrt"]
            engines = status.deployments["Engine"].replica_states
            if status.status == "RUNNING" and engines == {"RUNNING": 2}:
                return
            assert time.monotonic() < end, status
            time.sleep(0.1)


@pytest.fixture(scope="module")
def served(cluster):
    served = Served()
    served.deploy()
    yield served
    serve.shutdown()


class Load:
    """Callers that draw until they are told to stop; answers by the request's number."""

    def __init__(self, served):
        self._served, self._over, self.answers = served, threading.Event(), []

    def call(self, caller):
        """Draw one request after the other, and keep what came."""
        number = caller
        while not self._over.is_set():
            number = (number + 1) % len(REQUESTS)
            self.answers.append((number, self._served.draw(REQUESTS[number])))

    @contextmanager
    def running(self, callers=5):
        """Draw until the end of the `with`, and what was begun to its end."""
        with ThreadPoolExecutor(callers) as pool:
            calls = [pool.submit(self.call, caller) for caller in range(callers)]
            try:
                yield self
            finally:
                self._over.set()
        for call in calls:
            call.result()

    def check(self, alone):
        """Check that nothing was lost, and that every picture is what it is alone."""
        for number, answer in self.answers:
            assert answer.status_code == 200, answer.text
            data = base64.b64decode(answer.json()["data"][0]["b64_json"])
            assert digest(Image.open(io.BytesIO(data))) == alone[number]

    def wait(self, more):
        """Wait until so many more pictures have come."""
        wanted, end = len(self.answers) + more, time.monotonic() + LONG
        while len(self.answers) < wanted:
            assert time.monotonic() < end
            time.sleep(0.02)


def redrawn(served):
    """Return how many pictures the gateway of this caller has asked for again."""
    text = httpx.get(f"{served.url}/metrics").text
    (line,) = (x for x in text.splitlines() if x.startswith("latentrt_engine_restarts_total "))
    return float(line.split()[1])


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_replicas_lose_no_picture(served, alone, kills):
    load, before = Load(served), redrawn(served)
    with load.running():
        for kill in range(kills):
            load.wait(4)
            pids = served.replicas()
            time.sleep(random.uniform(0, 0.3))
            os.kill(victim := random.choice(sorted(pids)), signal.SIGKILL)
            load.wait(4)
            if kill + 1 < kills:
                while victim in titled(ENGINES):
                    time.sleep(0.05)
                served.wait_running()
    load.check(alone)
    assert redrawn(served) >= before + kills, "pictures were on board"
    served.wait_running()


def test_a_burst_is_told_when_to_come_again(served):
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(served.draw, [REQUESTS[0]] * 60))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(answers) - len(refused) >= QUEUE
    assert refused
    for answer in refused:
        assert answer.status_code == 429, answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "queue_full"


def test_jobs_are_found_by_whoever_began_them(served):
    """Both gateways have callers; each finds its own jobs at every request."""
    with httpx.Client(base_url=served.url) as client:
        for caller in range(6):
            headers = {"authorization": f"Bearer {caller}"}
            body = {"prompt": "a cat", "num_inference_steps": 2, "seed": 1}
            job = client.post("/api/v1/pictures", json=body, headers=headers)
            assert job.status_code == 202
            for _ in range(8):
                found = client.get(f"/api/v1/pictures/{job.json()['id']}", headers=headers)
                assert found.status_code == 200


def test_deployed_again_under_load_it_loses_nothing(served, alone):
    load, before = Load(served), served.replicas() | served.replicas(GATEWAYS)
    with load.running(3):
        load.wait(2)
        served.deploy(**{"max-queue": QUEUE + 1})
        load.wait(3)
    load.check(alone)
    served.wait_running()
    assert not before & (served.replicas() | served.replicas(GATEWAYS)), "all were replaced"


def test_only_this_machine_comes_in(served):
    other = {"host": "pictures.example.org"}
    assert httpx.get(f"{served.url}/v1/models", headers=other).status_code == 403
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", served.port), timeout=2)


def test_a_killed_gateway_leaves_another(served):
    os.kill(served.replicas(GATEWAYS).pop(), signal.SIGKILL)
    for _ in range(4):
        assert served.draw(REQUESTS[3]).status_code == 200
    served.replicas(GATEWAYS)


@pytest.mark.slow
def test_engines_come_with_pictures_that_wait_and_go_without(served, alone):
    quick = {"upscale_delay_s": 1, "downscale_delay_s": 5}
    served.deploy({"max_replicas": 2, "target_ongoing_requests": 2, **quick})
    served.replicas(count=1)
    load = Load(served)
    with load.running(8):
        served.replicas(count=2)
        load.wait(16)
    load.check(alone)
    served.replicas(count=1)
