"""OpenAI's own client against a server that draws with the model that ships."""

import base64
import io
import threading
import time

import numpy as np
import openai
import pytest
from PIL import Image

from runtime.images.files import read_settings
from serving.keys import Keys
from serving.limits import Limits
from tests.support.named_requests import IMAGE, MASK, write_lora
from tests.support.servers import SlowStudio, load, models, serving

STEPS = 4


OPEN = []


def client(running, **options):
    given = {"api_key": "none", "max_retries": 0, **options}
    OPEN.append(openai.OpenAI(base_url=f"{running.url}/v1", **given))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed():
    """Close the clients that a test has opened."""
    yield
    while OPEN:
        OPEN.pop().close()


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.b64_json))))


def file_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, format=kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def pipeline():
    return load("pictogram")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    lora = write_lora(tmp_path_factory.mktemp("loras"))
    with serving(models(loras={"ink": lora})) as started:
        yield started


@pytest.fixture
def fake():
    with serving(SlowStudio()) as started:
        yield started


def test_a_generation_is_the_pipelines_picture_bit_for_bit(running, pipeline):
    answer = client(running).images.generate(
        prompt="a red apple, fluent style",
        n=2,
        size="128x128",
        extra_body={"seed": 7, "num_inference_steps": STEPS, "sampler": "euler_a"},
    )
    wanted = pipeline(
        "a red apple, fluent style",
        seed=7,
        num_inference_steps=STEPS,
        sampler="euler_a",
        num_images_per_prompt=2,
    )
    assert len(answer.data) == 2
    for picture, image in zip(answer.data, wanted.images, strict=True):
        np.testing.assert_array_equal(pixels(picture), np.asarray(image))


def test_many_at_once_are_what_they_are_alone(running, pipeline):
    """Sixteen clients with other samplers, steps and scales at the same time."""
    picture_requests = [
        {"seed": i, "num_inference_steps": 3 + i % 4, "sampler": s, "guidance_scale": 2.0 + i % 3}
        for i, s in enumerate(["ddim", "euler_a", "lms", "unipc"] * 4)
    ]
    drawn = {}

    def ask(number):
        extra = {**picture_requests[number]}
        answer = client(running).images.generate(prompt=f"a {number}", extra_body=extra)
        drawn[number] = pixels(answer.data[0])

    threads = [
        threading.Thread(target=ask, args=(number,)) for number in range(len(picture_requests))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, picture_request in enumerate(picture_requests):
        (image,) = pipeline(f"a {number}", **picture_request).images
        np.testing.assert_array_equal(drawn[number], np.asarray(image))
    text = running.service.metrics.text().decode()
    assert any(f'bucket_rows="{rows}"' in text for rows in range(3, 9)), "rows shared steps"


def test_a_file_says_what_makes_it_again(running, pipeline, tmp_path):
    from runtime.__main__ import main

    answer = client(running).images.generate(
        prompt="a cat", extra_body={"num_inference_steps": STEPS, "seed": 3}
    )
    path = tmp_path / "cat.png"
    path.write_bytes(base64.b64decode(answer.data[0].b64_json))
    out = tmp_path / "again.png"
    assert main(["--again", str(path), "--threads", "1", "-o", str(out)]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(out)), pixels(answer.data[0]))


def test_a_prompt_stays_text_in_every_file(running, tmp_path):
    prompt = 'a \r\n\t"cat" \u2028 <script>alert(1)</script> \U0001f408'
    for kind in ("png", "webp", "jpeg"):
        answer = client(running).images.generate(
            prompt=prompt, output_format=kind, extra_body={"num_inference_steps": 1}
        )
        path = tmp_path / f"cat.{kind}"
        path.write_bytes(base64.b64decode(answer.data[0].b64_json))
        Image.open(path).load()
        if kind == "png":
            assert read_settings(path)["prompt"] == prompt
    for character in "\0\x1b\x7f\x08":
        with pytest.raises(openai.BadRequestError, match="prompt holds the character"):
            client(running).images.generate(prompt=f"a {character} cat")


@pytest.mark.parametrize("partials", [0, 1, 3])
def test_a_stream_has_its_partial_images_and_then_the_picture(running, pipeline, partials):
    events = list(
        client(running).images.generate(
            prompt="a cat",
            stream=True,
            partial_images=partials,
            extra_body={"num_inference_steps": 8, "seed": 3},
        )
    )
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * partials,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:-1]] == list(range(partials))
    for event in events:
        assert pixels(event).shape == (128, 128, 3)
    (image,) = pipeline("a cat", num_inference_steps=8, seed=3).images
    np.testing.assert_array_equal(pixels(events[-1]), np.asarray(image))


def test_an_edit_leaves_what_the_mask_covers(running):
    """OpenAI's mask is transparent where the picture is painted anew."""
    alpha = Image.fromarray(255 - np.asarray(MASK))
    mask = IMAGE.copy()
    mask.putalpha(alpha)
    answer = client(running).images.edit(
        image=("image.png", file_of(IMAGE), "image/png"),
        mask=("mask.png", file_of(mask), "image/png"),
        prompt="a blue hat",
        extra_body={"num_inference_steps": STEPS, "seed": 3},
    )
    after, kept = pixels(answer.data[0]), np.asarray(MASK) == 0
    np.testing.assert_array_equal(after[kept], np.asarray(IMAGE)[kept])
    assert (after[~kept] != np.asarray(IMAGE)[~kept]).any()


@pytest.mark.parametrize("way", ["a picture with holes", "a mask of black and white"])
def test_other_masks(running, way):
    """A picture's own transparency is a mask, and a mask without any is white where to paint."""
    image, extra = IMAGE.copy(), {"num_inference_steps": STEPS, "seed": 3}
    files = {"mask": ("mask.png", file_of(MASK), "image/png")}
    if way == "a picture with holes":
        image.putalpha(Image.fromarray(255 - np.asarray(MASK)))
        files = {}
    answer = client(running).images.edit(
        image=("image.png", file_of(image), "image/png"), prompt="a hat", extra_body=extra, **files
    )
    after, kept = pixels(answer.data[0]), np.asarray(MASK) == 0
    np.testing.assert_array_equal(after[kept], np.asarray(IMAGE)[kept])
    assert (after[~kept] != np.asarray(IMAGE)[~kept]).any()


@pytest.mark.filterwarnings("ignore:deprecated")  # OpenAI's own variations
def test_an_edit_without_a_mask_and_a_variation(running, pipeline):
    extra = {"num_inference_steps": 8, "seed": 3, "strength": 0.5}
    file = ("image.png", file_of(IMAGE), "image/png")
    edited = client(running).images.edit(image=file, prompt="a hat", extra_body=extra)
    varied = client(running).images.create_variation(image=file, extra_body=extra)
    for answer, prompt in ((edited, "a hat"), (varied, "")):
        (image,) = pipeline(prompt, image=IMAGE, **extra).images
        np.testing.assert_array_equal(pixels(answer.data[0]), np.asarray(image))


def test_an_adapter_by_its_name(running, pipeline, tmp_path):
    extra = {"num_inference_steps": STEPS, "seed": 3, "loras": {"ink": 0.8}}
    answer = client(running).images.generate(prompt="a cat", extra_body=extra)
    with load("pictogram") as other:
        other.set_loras([f"{write_lora(tmp_path)}:0.8"])
        (image,) = other("a cat", num_inference_steps=STEPS, seed=3).images
    np.testing.assert_array_equal(pixels(answer.data[0]), np.asarray(image))
    plain = client(running).images.generate(
        prompt="a cat", extra_body={"num_inference_steps": STEPS, "seed": 3}
    )
    assert (pixels(plain.data[0]) != np.asarray(image)).any()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(running, kind):
    answer = client(running).images.generate(
        prompt="a cat", output_format=kind, extra_body={"num_inference_steps": 1}
    )
    data = base64.b64decode(answer.data[0].b64_json)
    assert Image.open(io.BytesIO(data)).format.lower() == kind
    assert answer.output_format == kind


def test_models(running):
    assert [model.id for model in client(running).models.list()] == ["pictogram", "other"]
    assert client(running).models.retrieve("pictogram").owned_by == "latentrt"


@pytest.mark.parametrize(
    ("picture_requests", "kind", "code", "param"),
    [
        ({"model": "dall-e-9"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "../../etc/passwd"}, openai.NotFoundError, "model_not_found", "model"),
        ({"size": "big"}, openai.BadRequestError, "invalid_request", "size"),
        ({"size": "130x128"}, openai.BadRequestError, "invalid_request", None),
        ({"n": 11}, openai.BadRequestError, "too_much", "n"),
        ({"response_format": "url"}, openai.BadRequestError, "invalid_request", "response_format"),
        ({"extra_body": {"sampler": "none"}}, openai.BadRequestError, "invalid_request", "sampler"),
        ({"extra_body": {"seed": -1}}, openai.BadRequestError, "invalid_request", "seed"),
        ({"extra_body": {"loras": {"../ink": 1}}}, openai.NotFoundError, "lora_not_found", "loras"),
        ({"extra_body": {"num_inference_steps": 1.5}}, openai.BadRequestError, None, None),
    ],
)
def test_errors_are_openais(running, picture_requests, kind, code, param):
    with pytest.raises(kind) as raised:
        client(running).images.generate(prompt="a cat", **picture_requests)
    body = raised.value.body
    assert set(body) == {"message", "type", "param", "code"}
    if code is not None:
        assert body["code"] == code
    if param is not None:
        assert body["param"] == param
    assert "\n" not in body["message"]


def test_an_error_in_a_stream_is_an_error_of_the_client(fake):
    with pytest.raises(openai.APIError, match="the prompt is refused"):
        list(client(fake).images.generate(prompt="refused", stream=True))


def test_keys(tmp_path):
    import hashlib

    keys = Keys(hashes={"one": hashlib.sha256(b"secret").digest()})
    with serving(SlowStudio(), keys=keys) as running:
        for wrong in ("wrong", "", "secret "):
            with pytest.raises((openai.AuthenticationError, openai.OpenAIError)):
                client(running, api_key=wrong or "x").images.generate(prompt="a cat")
        answer = client(running, api_key="secret").images.generate(prompt="a cat")
        assert len(answer.data) == 1


def test_a_flood_is_told_when_to_come_again():
    with serving(SlowStudio(0.05), limits=Limits(jobs=2)) as running:
        threads = [
            threading.Thread(target=lambda: client(running).images.generate(prompt="a cat"))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while running.service.jobs.admission.jobs < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as raised:
            client(running).images.generate(prompt="a cat")
        assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
        assert raised.value.body["code"] == "queue_full"
        for thread in threads:
            thread.join(20)


def test_the_clients_own_retries_get_through_a_flood():
    """Fifty at once against room for twenty: the client comes again when it was told to."""
    drawn = []
    with serving(SlowStudio(0.01), limits=Limits(jobs=20)) as running:

        def ask():
            answer = client(running, max_retries=6).images.generate(prompt="a cat")
            drawn.append(len(answer.data))

        threads = [threading.Thread(target=ask) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        refused = running.service.metrics.text().decode()
    assert drawn == [1] * 50
    assert 'latentrt_refused_total{why="queue_full"}' in refused


def test_whoever_leaves_frees_the_row(fake):
    """The client gives up in the middle of a long picture: its row leaves at the next turn."""
    extra = {"num_inference_steps": 150}
    with pytest.raises(openai.APITimeoutError):
        client(fake, timeout=0.3).images.generate(prompt="long", extra_body=extra)
    stream = client(fake).images.generate(prompt="streamed", stream=True, extra_body=extra)
    time.sleep(0.1)
    stream.close()
    jobs, end = fake.service.jobs, time.monotonic() + 5
    while (jobs.admission.jobs or fake.loop.on_board) and time.monotonic() < end:
        time.sleep(0.01)
    assert jobs.admission.jobs == 0
    assert (fake.loop.on_board, fake.loop.waiting) == (0, 0)
