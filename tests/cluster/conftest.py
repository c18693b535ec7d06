"""A Ray cluster on this machine, for all tests here; nobody reaches it from elsewhere."""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

with warnings.catch_warnings(), suppress(ModuleNotFoundError):
    warnings.simplefilter("ignore")  # of Ray's own code
    import ray
    import ray.serve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = str(ROOT)  # of the processes that it starts
    ray.init(
        address="local",
        num_cpus=8,  # in its books
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=200 << 20,
    )
    yield ray
    ray.shutdown()
