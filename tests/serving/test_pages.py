"""The examples of docs/serving.md run as they are written, against a server that is elsewhere."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.images.files import read_settings
from tests.support.servers import load, models, serving

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
WHERE = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def url():
    with serving(models()) as running:
        yield running.url


def example(library):
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if library in c)
    assert code.count(WHERE) == 1
    return code


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # an example opens a client and ends
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_example_of_openais_api(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(example("openai").replace(WHERE, url), {})
    with load("pictogram") as pipeline:
        wanted = pipeline(
            "a red apple, fluent style",
            seed=7,
            sampler="euler_a",
            num_inference_steps=20,
            num_images_per_prompt=2,
        )
    for number, image in enumerate(wanted.images):
        drawn = Image.open(tmp_path / f"apple-{number}.png")
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))
    assert read_settings(tmp_path / "apple-1.png")["seed"] == 8


def test_the_example_of_the_native_api(url, capsys):
    names = {}
    exec(example("httpx").replace(WHERE, url), names)
    assert names["file"].startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "'jpeg'" in shown
    assert "'step'" in shown


def test_the_page_names_the_limits_as_they_are():
    from serving.bucket_scheduler import MAX_TURNS_WAITED
    from serving.limits import Limits

    limits = Limits()
    for told in (
        f"within {limits.pictures} pictures, {limits.steps} steps, sides of {limits.side}",
        f"{limits.prompt_characters:,} characters, {limits.chunks}",
        f"{limits.parts} parts, {limits.loras} adapters",
        f"(`--max-queue` unfinished requests ({limits.jobs})"[1:],
        f"work ({limits.queue_seconds:.0f})",
        f"waits more than {MAX_TURNS_WAITED} steps",
        f"bodies within {limits.body_bytes >> 20} MiB and {limits.body_seconds:.0f} s",
        f"{limits.upload_pixels // 10**6} megapixels",
        f"({limits.kept_bytes >> 20} MiB, ten minutes)",
    ):
        assert told in " ".join(PAGE.split()), told
