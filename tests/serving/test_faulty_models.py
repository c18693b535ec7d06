"""Models and adapters with faults of their own: told in one sentence, and nobody else is harmed."""

import os
import shutil
import signal
import threading

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.model import find_model
from serving.child import EngineSettings
from serving.http.fields import Catalog
from serving.limits import Limits
from serving.model_files import list_files
from serving.model_runner import Models
from tests.serving.test_supervisor import Watched, order
from tests.support.named_requests import write_lora
from tests.support.servers import load, serving

GENERATIONS = "/v1/images/generations"
STEPS = 3
SPOILT = "a spoilt hat"
PARTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
FAULTS = ("truncated", "text", "empty", "infinite", "wide", "unknown", "deleted", "folder")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Copies of the model that ships, each with a number that is none in one of its parts."""
    folders = {}
    for part, file in PARTS.items():
        folders[part] = tmp_path_factory.mktemp("models") / part
        shutil.copytree(find_model("pictogram"), folders[part])
        path = folders[part] / part / file
        tensors = load_file(path)
        name = max(tensors, key=lambda name: tensors[name].size)
        tensors[name] = tensors[name].copy()
        tensors[name].flat[0] = np.nan
        save_file(tensors, path)
    return folders


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """One adapter that fits and one for each fault; some are spoilt while they are served."""
    folder = tmp_path_factory.mktemp("loras")
    good = write_lora(folder)
    tensors = load_file(good)
    written = {
        "infinite": {name: array * np.float32(np.inf) for name, array in tensors.items()},
        "wide": {name: np.repeat(array, 5, 0) for name, array in tensors.items()},
        "unknown": {f"elsewhere.{name}": array for name, array in tensors.items()},
    }
    paths = {name: folder / f"{name}.safetensors" for name in FAULTS}
    for name, changed in written.items():
        save_file(changed, paths[name])
    paths["truncated"].write_bytes(good.read_bytes()[:-100])
    paths["text"].write_text("<html>404: not found</html>")
    paths["empty"].touch()
    paths["folder"].mkdir()
    return {"ink": good, **paths}


class SpoilingModels(Models):
    """Models that give one prompt's pictures latents that are no numbers, from their first step."""

    def step(self, unfinished_pictures):
        """As `ModelRunner` says."""
        super().step(unfinished_pictures)
        for picture in unfinished_pictures:
            if picture.picture_request.fields["prompt"] == SPOILT:
                picture.row.latents[...] = np.nan


@pytest.fixture(scope="module")
def http(damaged, adapters):
    models = {"pictogram": "pictogram", **{name: str(path) for name, path in damaged.items()}}
    runner = SpoilingModels(models=models, loras=adapters, load=load, limits=Limits())
    catalog = Catalog(models=tuple(models), loras=tuple(adapters))
    with (
        serving(runner, catalog=catalog) as started,
        httpx.Client(base_url=started.url, timeout=60) as client,
    ):
        yield client


def ask(http, prompt="a red hat", **fields):
    return http.post(
        GENERATIONS, json={"prompt": prompt, "seed": 3, "num_inference_steps": STEPS, **fields}
    )


def file_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["b64_json"]


def refusal(answer, status, *paths):
    assert answer.status_code == status, answer.text
    told = answer.json()["error"]
    assert "\n" not in told["message"]
    assert not any(str(path) in answer.text for path in paths)
    assert answer.headers["x-should-retry"] == "false"
    return told


@pytest.mark.parametrize("sampler", ["euler_a", "lms"])
def test_a_picture_of_no_numbers_fails_and_its_neighbours_are_the_same(http, sampler):
    """NaN is in one row of every step: the others are bit for bit what they are alone."""
    prompts = [f"a {colour} hat" for colour in ("red", "blue")]
    given = {"sampler": sampler, "num_inference_steps": 12}
    alone = {prompt: file_of(ask(http, prompt, **given)) for prompt in prompts}
    answers = {}

    def begin(prompt):
        answers[prompt] = ask(http, prompt, **given)

    threads = [threading.Thread(target=begin, args=(prompt,)) for prompt in (*prompts, SPOILT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    told = refusal(answers.pop(SPOILT), 500)
    assert told["code"] == "not_finite"
    assert told["message"].startswith("the model pictogram gave no numbers (NaN)")
    assert {prompt: file_of(answer) for prompt, answer in answers.items()} == alone
    assert any(answer.json()["data"][0]["batched"] for answer in answers.values())


@pytest.mark.parametrize("part", PARTS)
def test_a_model_with_numbers_that_are_none_is_unavailable(http, damaged, part):
    """Whichever of its parts they are in; the other models are drawn with as before."""
    plain = file_of(ask(http))
    for _ in range(2):
        told = refusal(ask(http, model=part), 503, damaged[part])
        assert told["code"] == "model_unavailable"
        assert told["message"].startswith(f"{part} cannot be loaded")
    assert file_of(ask(http)) == plain


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_cannot_be_put_on_leaves_the_model_as_it_is(http, adapters, fault):
    """By a field and by the prompt; before, beside and after, the same picture as ever."""
    plain, inked = file_of(ask(http)), file_of(ask(http, loras={"ink": 0.8}))
    if fault == "deleted":
        adapters[fault].unlink(missing_ok=True)
    told = refusal(ask(http, loras={fault: 0.8}), 400, adapters[fault])
    assert (told["code"], "loras" in told["message"]) == ("invalid_request", True)
    assert fault in told["message"]
    told = refusal(ask(http, loras={"ink": 0.8, fault: 0.5}), 400, adapters[fault])
    assert "ink" in told["message"]
    refusal(ask(http, f"a red hat<lora:{fault}:1>"), 400, adapters[fault])
    assert file_of(ask(http)) == plain
    assert file_of(ask(http, loras={"ink": 0.8})) == inked != plain


@pytest.mark.parametrize("fault", ["deleted", "damaged"])
def test_an_engine_starts_again_without_its_first_model(tmp_path, fault):
    """It draws with the others; whoever asks for the first is told, and nobody waits for ever."""
    folder = tmp_path / "first"
    shutil.copytree(find_model("pictogram"), folder)
    settings = EngineSettings(
        models={"first": str(folder), "pictogram": "pictogram"},
        files={str(folder): list_files(folder)} if fault == "deleted" else {},
        backend="cpu",
        threads=1,
    )
    with Watched(settings) as watched:
        watched.engine.submit(order("before", model="first"))
        watched.wait(lambda: watched.files)
        if fault == "deleted":
            shutil.rmtree(folder)
        else:
            os.truncate(folder / "unet" / "diffusion_pytorch_model.safetensors", 1000)
        watched.engine.submit(order("on its way", model="first", num_inference_steps=150))
        os.kill(watched.engine.pid, signal.SIGKILL)
        watched.wait(lambda: "on its way" in watched.failed)
        watched.engine.submit(order("first", model="first"))
        watched.engine.submit(order("other"))
        watched.wait(lambda: ("other", 0) in watched.files and "first" in watched.failed)
    assert watched.failed == dict.fromkeys(("on its way", "first"), "model_unavailable")
    assert watched.deaths == 1
