"""docs/theory.md: its links lead to the lines that they quote, and its equations are the code's."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from runtime.conditioning.guidance import Guidance
from runtime.samplers import program
from runtime.samplers.noise_schedule import NoiseSchedule

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
LINK = re.compile(r"\[`([\w/.]+)`\]\(\.\./([\w/.]+)\),\s+`([\w.]+)`:\s+`([^`]+)`")
EQUATION = re.compile(r"```text\n(.*?)```(.*?)(?=```|\Z|^#)", re.DOTALL | re.MULTILINE)


def source_of(path, symbol):
    """Return the text of a function, a class or what is within one; None where there is none."""
    text = path.read_text(encoding="utf-8")
    node = ast.parse(text)
    for name in symbol.split("."):
        named = (each for each in node.body if getattr(each, "name", None) == name)
        node = next(named, None)
        if node is None:
            return None
    return ast.get_source_segment(text, node)


def joined(text):
    """Leave out what formatting changes: white space, and the comma before a closing bracket."""
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s+", "", text))


def quotes(found, line):
    return joined(line) in joined(found)


@pytest.mark.parametrize("link", LINK.findall(PAGE), ids=lambda link: f"{link[2]}-{link[3][:30]}")
def test_every_line_is_where_the_page_says(link):
    shown, target, symbol, line = link
    assert shown == target
    found = source_of(ROOT / target, symbol)
    assert found is not None, f"{target} has no {symbol}"
    assert quotes(found, line), f"{symbol} of {target} has no line {line}"


def test_every_equation_has_its_line():
    equations = EQUATION.findall(PAGE)
    assert len(equations) >= 15
    assert PAGE.count("```text") == len(equations)
    assert [equation for equation, after in equations if not LINK.search(after)] == []


def test_links_are_all_read():
    assert len(LINK.findall(PAGE)) == PAGE.count("](../")


def test_what_is_not_there_is_found_out():
    path = ROOT / "runtime" / "samplers" / "program.py"
    assert source_of(path, "predict") is not None
    assert source_of(path, "Program.blended") is not None
    assert source_of(path, "Program.predict") is None
    assert not quotes(source_of(path, "predict"), "return x0, eps")


def test_the_sampler_steps_by_the_posterior():
    """DDPM's matrices are equations 6 and 7 of its paper, at each of its timesteps."""
    total = 20
    schedule = NoiseSchedule.from_config(
        {"beta_schedule": "linear", "num_train_timesteps": total, "beta_end": 0.3}
    )
    steps = program("ddpm", schedule, total)
    rng = np.random.default_rng(0)
    for k, matrix in enumerate(steps.matrices):
        t = total - 1 - k
        signal = schedule.alphas_cumprod[t]
        reached = schedule.alphas_cumprod[t - 1] if t else 1.0
        beta = 1 - signal / reached
        x0, eps, z = rng.normal(size=3)
        x_t = np.sqrt(signal) * x0 + np.sqrt(1 - signal) * eps
        mean = (np.sqrt(reached) * beta * x0 + np.sqrt(1 - beta) * (1 - reached) * x_t) / (
            1 - signal
        )
        deviation = np.sqrt((1 - reached) / (1 - signal) * beta)
        assert steps.needs_noise[k] == (t > 0)
        assert matrix[0] @ [x_t, eps, z] == pytest.approx(mean + deviation * z)


@pytest.mark.parametrize("scale", [1.5, 3.0, 7.5])
@pytest.mark.parametrize("signal", [0.9, 0.3, 0.01])
def test_guidance_without_a_classifier_is_guidance_by_one(scale, signal):
    """For two normal distributions, c and another, the predictions and the classifier are known."""
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    x = np.linspace(-4, 4, 33)
    means, variances = alpha * np.array([-1.5, 1.0]), signal * np.array([0.2, 0.6]) + sigma**2

    def joint(x):
        """Return the density of each of the two and x, (2, 33)."""
        density = np.exp(-((x - means[:, None]) ** 2) / (2 * variances[:, None]))
        return density * np.array([[0.7], [0.3]]) / np.sqrt(variances)[:, None]

    def classifier(x):
        return joint(x) / joint(x).sum(0)

    scores = (means[:, None] - x) / variances[:, None]
    cond, uncond = -sigma * scores[0], -sigma * (classifier(x) * scores).sum(0)
    above, below = (np.log(classifier(x + step)[0]) for step in (1e-5, -1e-5))
    gradient = (above - below) / 2e-5
    by_classifier = uncond - scale * sigma * gradient
    weights = Guidance.over(scale, 1).weights(scale, np.ones((1, 1)))
    without = weights[0] * uncond + weights[1] * cond
    np.testing.assert_allclose(without, by_classifier, atol=1e-5)
