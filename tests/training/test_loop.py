import pytest
import torch
from torch import nn

from engine.errors import RequestError
from training import loop as loop_module
from training.loop import Loop, LoopSettings, attention, autocast, draw


def settings(**changes):
    values = {"steps": 60, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 5}
    return LoopSettings(**{**values, **changes})


def linear():
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    return module


def regression(module):
    """Return losses of y = x · (1, -2, 3), with data that depend on the step alone."""

    def losses(step):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        target = x @ torch.tensor([[1.0], [-2.0], [3.0]])
        return {"loss": (module(x) - target).square().mean()}

    return losses


def run(checkpoint, **changes):
    module = linear()
    loop = Loop(module, settings(**changes), checkpoint)
    return loop, loop.run(regression(module))


def test_the_loss_falls(tmp_path):
    module = linear()
    losses = regression(module)
    before = losses(1000)["loss"].item()
    loop = Loop(module, settings(steps=300, ema_decay=0.9), tmp_path / "a.pt")
    ema = loop.run(losses)
    assert loop.step == 300
    assert regression(ema)(1000)["loss"].item() < 0.01 * before


@pytest.mark.parametrize("muon", [False, True])
def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path, muon):
    unbroken, expected = run(tmp_path / "a.pt", muon=muon)

    def stop(ema, step):
        raise KeyboardInterrupt

    module = linear()
    first = Loop(module, settings(sample_steps=20, save_seconds=0, muon=muon), tmp_path / "b.pt")
    with pytest.raises(KeyboardInterrupt):
        first.run(regression(module), sample=stop)
    first.save()
    second_module = linear()
    second = Loop(second_module, settings(muon=muon), tmp_path / "b.pt")
    assert (second.step, second.seconds) == (20, first.seconds)
    assert second.seconds > 0
    torch.testing.assert_close(second.ema.state_dict(), first.ema.state_dict(), rtol=0, atol=0)
    ema = second.run(regression(second_module))
    assert second.step == unbroken.step == 60
    torch.testing.assert_close(ema.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_finished_training_does_nothing_more(tmp_path):
    _, first = run(tmp_path / "a.pt")
    loop, ema = run(tmp_path / "a.pt")
    assert loop.step == 60
    torch.testing.assert_close(ema.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_a_kill_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint = tmp_path / "a.pt"
    loop, _ = run(checkpoint, steps=10)
    old = checkpoint.read_bytes()

    def killed(state, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(loop_module.torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.save()
    assert checkpoint.read_bytes() == old
    assert Loop(linear(), settings(steps=10), checkpoint).step == 10


def test_minutes_end_a_training(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 1))
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: float(next(clock)))
    loop, _ = run(tmp_path / "a.pt", steps=1000, minutes=0.25)
    assert loop.seconds == 15
    assert loop.step == 15
    assert loop.fraction() == 1


def test_samples_and_checkpoints_come_when_they_are_due(tmp_path):
    module, sampled = linear(), []
    loop = Loop(module, settings(sample_steps=25), tmp_path / "deep" / "a.pt")
    loop.run(regression(module), sample=lambda ema, step: sampled.append(step))
    assert sampled == [25, 50]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.pt"]


def test_the_learning_rate_warms_up_and_falls_to_nothing(tmp_path):
    loop = Loop(linear(), settings(steps=100, warmup_steps=10), tmp_path / "a.pt")
    rates = []
    for step in range(101):
        loop.step = step
        rates.append(loop.learning_rate() / 0.05)
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.03)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-6)


def test_the_average_follows_its_decay(tmp_path):
    module = linear()
    loop = Loop(module, settings(steps=3, ema_decay=0.5), tmp_path / "a.pt")
    average = torch.zeros(1, 3)
    for step in range(3):
        loop._update(regression(module)(step)["loss"])
        decay = min(0.5, (2 + step) / (11 + step))
        average = decay * average + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(loop.ema.weight, average)
    assert not loop.ema.weight.requires_grad


def test_frozen_parameters_stay(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    Loop(module, settings(steps=5), tmp_path / "a.pt").run(regression(module))
    torch.testing.assert_close(module[0].weight, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}, {"warmup_steps": 0}, {"minutes": 0}],
)
def test_settings_that_cannot_run_are_refused(changes):
    with pytest.raises(RequestError, match="give a positive number"):
        settings(**changes)


@pytest.mark.parametrize("weights", [None, [0.0, 1.0, 0.0, 3.0]])
def test_indices_are_drawn_by_weight(weights):
    torch.manual_seed(0)
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    drawn = draw(4, 8000, given, torch.device("cpu"))
    shares = (torch.bincount(drawn, minlength=4) / 8000).tolist()
    assert shares == pytest.approx([0, 0.25, 0, 0.75] if weights else [0.25] * 4, abs=0.03)


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    module = linear()
    loop = Loop(module, settings(), tmp_path / "a.pt")
    with pytest.raises(RequestError, match=r"nan at step 20.*--learning-rate"):
        loop.run(lambda step: {"loss": module.weight.sum() * torch.nan})


def test_processors_compute_attention_plainly():
    with autocast("cpu"), attention("cpu"):
        out = nn.functional.scaled_dot_product_attention(*(torch.ones(1, 1, 2, 4),) * 3)
    assert out.shape == (1, 1, 2, 4)


def test_a_training_in_pieces_ends_as_an_unbroken_one(tmp_path):
    _, expected = run(tmp_path / "a.pt")
    for part, steps in ((0.25, 15), (0.5, 30), (1.0, 60), (0.5, 60)):
        loop, ema = run(tmp_path / "b.pt", stop=part)
        assert loop.step == steps
    torch.testing.assert_close(dict(ema.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("stop", [0, -0.5, 1.1, float("nan")])
def test_a_part_that_is_none_is_refused(stop):
    with pytest.raises(RequestError, match=r"stop is .*; give a number above 0, up to 1"):
        settings(stop=stop)
