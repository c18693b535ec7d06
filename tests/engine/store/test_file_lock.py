import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.store.file_lock import hold, locked, release, remove_lock, remove_unheld

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from pathlib import Path
from engine.store.file_lock import hold
print(hold(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"engine")
    yield path
    release(path)


def test_a_lock_is_had_once(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as first, locked(path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(path, wait=False) as mine:
        assert mine


def test_a_lock_in_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), locked(tmp_path / "missing" / "lock"):
        pass


def test_a_lock_is_removed_unless_somebody_has_it(tmp_path):
    path = tmp_path / "lock"
    with locked(path):
        remove_lock(path)
        assert path.exists()
    remove_lock(path)
    assert not path.exists()


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path):
    """Or two would be in: the one that waited for it, and the one that made another."""
    path, entered, leave = tmp_path / "lock", threading.Event(), threading.Event()

    def wait():
        with locked(path):
            entered.set()
            leave.wait()

    waiting = threading.Thread(target=wait)
    with locked(path):
        waiting.start()
        time.sleep(0.1)  # for it to meet the lock
        path.unlink()
    assert entered.wait(10)
    with locked(path, wait=False) as mine:
        assert not mine
    leave.set()
    waiting.join()


def test_a_file_that_is_held_stays(file):
    assert hold(file)
    assert hold(file), "again"
    assert not remove_unheld(file)
    release(file)
    release(file)
    assert remove_unheld(file)
    assert not file.exists()
    assert remove_unheld(file), "it is gone"
    assert not hold(file)


def test_a_file_in_the_place_of_one_that_was_held_is_held(file):
    assert hold(file)
    file.unlink()
    assert not hold(file)
    file.write_bytes(b"another")
    assert hold(file)
    assert not remove_unheld(file)


def test_a_file_that_another_process_holds_stays_until_it_ends(file):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert child.stdout.readline() == "True\n"
        assert not remove_unheld(file)
        assert file.exists()
    finally:
        child.kill()
        child.communicate()
    assert remove_unheld(file)
