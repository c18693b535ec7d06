"""Several processes that train one model: the losses and the weights are those of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import USER_ERROR, RequestError
from tests.support.distributed_training import LOSSES, STEPS, train
from training import devices
from training.__main__ import main

ROOT = Path(__file__).parents[2]


def start(folder, rank, count, port):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.distributed_training", str(folder)], env=environment
    )


def test_two_processes_have_the_loss_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / "one", tmp_path / "two"]
    started = [start(folders[1], rank, 2, port) for rank in range(2)]
    try:
        one = train(folders[0])
        assert [process.wait(240) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    two = json.loads((folders[1] / LOSSES).read_text())
    assert len(set(one)) == len(one) == STEPS
    # bfloat16 rounds alike row by row; the sums of two halves are rounded apart
    assert two == pytest.approx(one, rel=1e-3)
    weights = [
        torch.load(folder / "diffusion.pt", weights_only=True)["module"] for folder in folders
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=2e-2, atol=2e-3)


def test_a_batch_is_shared_out_evenly(monkeypatch):
    monkeypatch.setattr(devices, "count", lambda: 3)
    devices.check_batch(6)
    with pytest.raises(RequestError, match="--batch-size 8 is of all processes together"):
        devices.check_batch(8)


def test_one_process_is_all_there_is():
    rows = torch.arange(6)
    assert devices.share(rows) is rows
    assert devices.is_first()
    assert devices.agreed(3.5) == 3.5
    value = torch.tensor(2.5, dtype=torch.float64)
    assert devices.mean(value) == 2.5


def test_commands_for_one_process_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "count", lambda: 2)
    assert main(["ship", "--out", str(tmp_path / "a"), "--work", str(tmp_path)]) == USER_ERROR
    assert "this command runs in one process" in capsys.readouterr().err
