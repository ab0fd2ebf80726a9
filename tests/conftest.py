"""Fixtures that several test files share. One thread: two beside another process are slower."""
from pathlib import Path

import pytest
import torch

import common

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The folder for what is made once: toy clips, toy CLIPs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small data set of toy clips, in the CSV format."""
    folder = tmp_path_factory.mktemp("data") / "small-toy"
    common.make_toy_folder(folder, train=48, test=24)
    return folder


@pytest.fixture(scope="session")
def shared():
    """Real clips that are not part of the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real clips beside the checkout")
    return folder
