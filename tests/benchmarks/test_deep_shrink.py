"""What counts as a doubled subject, and what the table says of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import deep_shrink
from runtime import Pipeline

WHITE = 255


def with_shapes(side, count):
    """Draw so many black squares on white, and a dot that is none."""
    pixels = np.full((side, side, 3), WHITE, np.uint8)
    for number in range(count):
        at = side // 16 + number * side // 4
        pixels[at : at + side // 5, at : at + side // 5] = 0
    pixels[-3:-1, 2:4] = 0
    return pixels


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_shapes_are_counted(count):
    assert deep_shrink.shapes(with_shapes(64, count)) == count


def test_a_ring_is_one_shape_and_a_shape_at_the_edge_does_not_go_on_behind():
    ring = np.full((64, 64, 3), WHITE, np.uint8)
    ring[8:56, 8:56] = 0
    ring[16:48, 16:48] = WHITE
    assert deep_shrink.shapes(ring) == 1
    edges = np.full((64, 64, 3), WHITE, np.uint8)
    edges[20:40, :10] = edges[20:40, -10:] = 0
    assert deep_shrink.shapes(edges) == 2


def test_what_is_doubled_has_more_shapes_than_the_small_picture(monkeypatch, tmp_path, capsys):
    def draw(text, *, height, deep_shrink, **options):
        count = 1 if height == 128 or deep_shrink == 0.5 else 2
        return SimpleNamespace(images=[Image.fromarray(with_shapes(height, count))])

    monkeypatch.setattr(Pipeline, "load", lambda **options: draw)
    out = tmp_path / "shrunk.json"
    assert deep_shrink.main(["--pictures", "2", "--steps", "1", "--out", str(out)]) == 0
    drawn = json.loads(out.read_text())["drawn"]
    assert [each["doubled"] for each in drawn.values()] == [0, 2, 2, 0]
    assert [each["shapes_mean"] for each in drawn.values()] == [1, 2, 2, 1]
    assert "| 256 × 256, deep shrink 0.5 |" in capsys.readouterr().out
