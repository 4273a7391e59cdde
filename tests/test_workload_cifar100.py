import pytest

from fedrevive_jax.config import PUBLISHED_METHODS
from tests import workloads


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return workloads.prepare("cifar100", tmp_path_factory.mktemp("cifar100"))


@pytest.mark.parametrize("method", PUBLISHED_METHODS)
def test_small_run(method, data_dir, tmp_path):
    workloads.check_small_run("cifar100", method, data_dir, tmp_path / "run")
