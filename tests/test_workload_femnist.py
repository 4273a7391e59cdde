import pytest

from fedrevive_jax.config import PUBLISHED_METHODS
from tests import workloads


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return workloads.prepare("femnist", tmp_path_factory.mktemp("femnist"))


@pytest.mark.parametrize("method", PUBLISHED_METHODS)
def test_small_run(method, data_dir, tmp_path):
    workloads.check_small_run("femnist", method, data_dir, tmp_path / "run")


def test_commands(tmp_path):
    data_dir = workloads.prepare("femnist", tmp_path / "data")
    workloads.check_commands("femnist", data_dir, tmp_path / "run")
