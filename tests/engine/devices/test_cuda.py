import builtins
import gc
import threading

import numpy as np
import pytest
from cuda.bindings import driver

from engine.devices.cuda import CudaDevice, DeviceFacts, find_device
from engine.errors import BackendError
from tests.support.fake_cuda import FakeDevice
from tests.support.fake_cuda_core import FakeCuda

FLOAT = np.dtype(np.float32)


@pytest.fixture
def machine():
    return FakeCuda()


@pytest.fixture(params=["cuda", "fake"])
def device(request, machine):
    """`CudaDevice`, and the stand-in for it that other tests use: both keep the same promises."""
    return CudaDevice(machine.core, machine.driver, 0) if request.param == "cuda" else FakeDevice()


@pytest.fixture
def gpu(machine):
    return CudaDevice(machine.core, machine.driver, 0)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "array",
    [
        numbers(3, 5),
        numbers(300, 500),
        np.arange(7),
        np.arange(9, dtype=np.uint8).reshape(3, 3).T,
        numbers(4, 4).astype(np.float16),
        np.float32(3.5),
        numbers(0, 4),
    ],
)
def test_arrays_go_up_and_come_back(device, array):
    array = np.asarray(array)
    placed = device.empty(array.shape, array.dtype)
    device.upload(array, placed)
    result = device.download(placed)
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


def test_an_array_may_change_as_soon_as_it_is_uploaded(device):
    array, placed = numbers(4), [device.empty((4,), FLOAT) for _ in range(3)]
    wanted = []
    for target in placed:
        device.upload(array, target)
        wanted.append(array.copy())
        array += 1
    for target, values in zip(placed, wanted, strict=True):
        np.testing.assert_array_equal(device.download(target), values)


def test_what_came_back_is_the_caller_s(device):
    placed = device.empty((4,), FLOAT)
    device.upload(numbers(4), placed)
    first = device.download(placed)
    device.upload(numbers(4, seed=1), placed)
    device.download(placed)
    np.testing.assert_array_equal(first, numbers(4))


def test_rows_lie_in_their_table(device):
    table = device.empty((3, 5), FLOAT)
    device.upload(numbers(3, 5), table)
    device.copy(table[2], table[0])
    np.testing.assert_array_equal(device.download(table), numbers(3, 5)[[2, 1, 2]])
    with pytest.raises(IndexError, match="row 3 of 3"):
        table[3]


def test_addresses_are_aligned_and_empty_arrays_have_one(device):
    addresses = {device.empty((size,), FLOAT).address % 256 for size in (0, 1, 63, 1000)}
    assert addresses == {0}


def test_work_is_recorded_without_being_done_and_queued_again(device):
    source, target = device.empty((4,), FLOAT), device.empty((4,), FLOAT)
    device.upload(np.zeros(4, np.float32), target)
    replay = device.record(lambda: device.copy(source, target))
    device.upload(numbers(4), source)
    np.testing.assert_array_equal(device.download(target), np.zeros(4))
    for seed in (1, 2):
        device.upload(numbers(4, seed=seed), source)
        replay()
        np.testing.assert_array_equal(device.download(target), numbers(4, seed=seed))


def test_scratch_is_one_piece_that_grows(device):
    small = device.scratch(100)
    assert small.nbytes >= 100
    assert device.scratch(50).address == small.address
    assert device.scratch(100_000).nbytes >= 100_000
    assert device.scratch(100).nbytes >= 100_000


def test_a_recorded_graph_keeps_the_scratch_memory_that_it_uses(device):
    scratch, target = device.scratch(16), device.empty((16,), np.dtype(np.uint8))
    replay = device.record(lambda: device.copy(target, device.scratch(16)))
    del scratch
    device.scratch(4096)
    gc.collect()
    replay()
    device.wait()


def test_memory_is_freed_with_its_last_array(machine, gpu):
    free = machine.memory.memory()[0]
    placed = gpu.empty((1000,), FLOAT)
    row = placed.memory, gpu.empty((2, 1000), FLOAT)[1]
    del placed
    assert machine.memory.memory()[0] == free - 4000 - 8000  # the row keeps all of its table
    del row
    gc.collect()
    assert machine.memory.memory()[0] == free


def test_memory_that_goes_while_a_graph_is_recorded_is_freed_afterwards(machine, gpu):
    held = [gpu.empty((1000,), FLOAT)]
    target = gpu.empty((8,), FLOAT)
    seen = []

    def work():
        free = machine.memory.memory()[0]
        held.clear()
        seen.append(machine.memory.memory()[0] - free)
        gpu.copy(target, target)

    free = machine.memory.memory()[0]
    gpu.record(work)
    assert seen == [0]
    assert machine.memory.memory()[0] == free + 4000


@pytest.mark.parametrize("what", ["empty", "upload", "record"])
def test_what_a_graph_cannot_hold_is_refused_and_the_next_is_recorded(machine, gpu, what):
    placed = gpu.empty((4,), FLOAT)
    refused = {
        "empty": lambda: gpu.empty((4,), FLOAT),
        "upload": lambda: gpu.upload(numbers(4), placed),
        "record": lambda: gpu.record(lambda: None),
    }[what]
    with pytest.raises(BackendError, match="while a graph is recorded"):
        gpu.record(refused)
    gpu.record(lambda: gpu.copy(placed, placed))()
    gpu.wait()
    assert machine.launches == 1


def test_staging_memory_is_used_again_once_its_copy_is_done(machine, gpu):
    placed = gpu.empty((4,), FLOAT)
    for _ in range(5):
        gpu.upload(numbers(4), placed)
    assert len(machine.page_locked) == 5
    gpu.wait()
    for _ in range(5):
        gpu.upload(numbers(4), placed)
    gpu.download(placed)
    assert len(machine.page_locked) == 6


def test_only_download_and_wait_wait(machine, gpu):
    source, target = gpu.empty((4,), FLOAT), gpu.empty((4,), FLOAT)
    gpu.upload(numbers(4), source)
    gpu.copy(source, target)
    gpu.record(lambda: gpu.copy(source, target))()
    assert machine.memory.counts["wait"] == 0
    gpu.download(target)
    gpu.wait()
    assert machine.memory.counts["wait"] == 2


def test_too_little_memory_is_said_and_the_device_goes_on():
    machine = FakeCuda(total=2**20)
    gpu = CudaDevice(machine.core, machine.driver, 0)
    with pytest.raises(BackendError) as refused:
        gpu.empty((2**20,), FLOAT)
    message = str(refused.value)
    assert "4.0 MiB of the GPU's memory were asked for" in message
    assert "1.5 MiB of 1.0 MiB are free, so 2.5 MiB are missing" in message
    assert machine.trims == 1
    placed = gpu.empty((4,), FLOAT)
    gpu.upload(numbers(4), placed)
    np.testing.assert_array_equal(gpu.download(placed), numbers(4))


def test_other_failures_are_not_taken_for_want_of_memory(machine, gpu, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS: it wrote elsewhere\nmore")

    monkeypatch.setattr(gpu._pool._fake, "allocate", fail, raising=False)
    with pytest.raises(BackendError, match=r"failed \(CUDA_ERROR_ILLEGAL_ADDRESS: it wrote else"):
        gpu.empty((4,), FLOAT)


def test_what_the_pool_keeps_is_free(machine, gpu):
    assert gpu.memory() == (2**24 + 2**19, 2**24)


def test_an_engine_s_facts(gpu):
    assert gpu.facts == DeviceFacts(name="NVIDIA Made Up 4090", sm="sm89", driver="580.65.6")
    assert gpu.stream == 0x57


def test_every_thread_makes_the_gpu_its_own_once(machine, gpu):
    placed = gpu.empty((4,), FLOAT)
    gpu.wait()
    assert machine.current == 1
    thread = threading.Thread(target=lambda: gpu.upload(numbers(4), placed))
    thread.start()
    thread.join()
    assert machine.current == 2
    np.testing.assert_array_equal(gpu.download(placed), numbers(4))


def test_without_a_driver_one_sentence_says_what_to_do():
    find_device.cache_clear()
    try:
        from cuda.bindings import driver

        driver.cuInit(0)
    except Exception:
        with pytest.raises(BackendError, match=r"no GPU 0 .*install NVIDIA's driver"):
            find_device()
    else:
        pytest.skip("there is a driver")


def test_without_the_packages_one_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == "cuda":
            raise ImportError("No module named 'cuda'")
        return real(name, *args, **kwargs)

    find_device.cache_clear()
    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(BackendError, match=r"pip install cuda-core cuda-bindings`.*'\.\[cuda\]'"):
        find_device()


def test_no_such_gpu(machine):
    with pytest.raises(ValueError, match="device_id"):
        CudaDevice(machine.core, machine.driver, 3)


def test_the_pool_keeps_what_is_free_for_later():
    machine = FakeCuda()
    CudaDevice(machine.core, machine.driver, 0)
    threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    assert machine.pool_attributes == {threshold: 2**64 - 1}
