"""The paper's four workloads as whole small runs: every method once, FedRevive on images and texts.

What the data sets differ in is how samples are read, augmented and made; what the methods differ in
does not depend on the data. CIFAR-100 is read as CIFAR-10 is, and rotated beside.
"""

import pytest

from tests import workloads

pytestmark = pytest.mark.slow

RUNS = {
    "cifar10": ("fedbuff",),
    "cifar100": ("fedrevive",),
    "femnist": ("fedrevive", "dd_fedrevive", "fedavg"),  # a client for each writer
    "newsgroups": ("fedrevive", "dd_fedrevive"),  # text
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """name -> the folder of a prepared data set; each is written once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = workloads.prepare(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return folder


@pytest.mark.parametrize(
    ("dataset", "method"), [(name, method) for name, own in RUNS.items() for method in own]
)
def test_small_run(dataset, method, prepared, tmp_path):
    workloads.check_small_run(dataset, method, prepared(dataset), tmp_path / "run")


@pytest.mark.parametrize("dataset", ["femnist", "newsgroups"])
def test_commands(dataset, tmp_path):
    """AFL-DW, the fifth method."""
    workloads.check_commands(
        dataset, workloads.prepare(dataset, tmp_path / "data"), tmp_path / "run"
    )
