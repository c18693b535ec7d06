import json

import numpy as np
import pytest

from benchmarks import comparison_tables, quality
from benchmarks.__main__ import main
from engine.errors import BackendError
from runtime import Pipeline


@pytest.fixture
def settings(monkeypatch):
    """The same backend twice, once with a bound that nothing reaches, and one that is not there."""
    same = quality.Setting(precision="float32", backend="cpu", psnr_db=90.0, ssim=0.99)
    strict = quality.Setting(precision="float32", backend="cpu", psnr_db=101.0, ssim=0.99)
    other = quality.Setting(precision="float32", backend="openvino", psnr_db=1.0, ssim=0.1)
    monkeypatch.setattr(quality, "SETTINGS", {"same": same, "strict": strict, "other": other})

    monkeypatch.setattr("benchmarks.machine.SIDE", 64)

    def drawn(setting, pictures, steps, threads):
        if setting is other:
            raise BackendError("it is not installed")
        pipeline = kept.setdefault(0, Pipeline.load())
        wishes = {"num_inference_steps": steps, "seed": quality.SEED}
        return [np.asarray(pipeline(quality.PROMPTS[0], **wishes).images[0])] * pictures

    kept = {}
    monkeypatch.setattr(quality, "_draw", drawn)


def test_a_setting_beyond_its_bound_fails_the_run(settings, tmp_path, capsys):
    out = tmp_path / "quality.json"
    assert main(["quality", "--pictures", "2", "--steps", "1", "--out", str(out)]) == 1
    assert "beyond their bounds: strict" in capsys.readouterr().err
    measured = json.loads(out.read_text())
    assert measured["exceeded"] == ["strict"]
    assert measured["settings"]["other"] == {"skipped": "it is not installed"}
    table = comparison_tables.quality_table(measured)
    assert "| same | 100.0 dB | 100.0 dB | 90 dB | 1.0000 |" in table
    assert "| other | not measured: it is not installed |" in table


def test_pictures_that_differ_are_seen():
    rng = np.random.default_rng(0)
    expected = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(3)]
    given = [255 - picture for picture in expected]
    setting = quality.Setting(precision="float32", backend="cpu", psnr_db=0.0, ssim=0.5)
    found = quality.compared(given, expected, setting)
    assert found["psnr_db"]["median"] < 15
    assert found["exceeded"], "for its SSIM"


def test_the_reference_draws_every_prompt():
    pictures = quality._draw(quality.REFERENCE, 2, 1, 1)
    assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 2
    assert len(set(quality.PROMPTS)) == 20


@pytest.mark.parametrize("pictures", ["0", "21"])
def test_more_pictures_than_prompts_are_refused(pictures, capsys):
    assert main(["quality", "--pictures", pictures]) == 2
    assert "give 1 to 20" in capsys.readouterr().err
