"""Fixtures, and settings that have to be made before any test module is imported."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from rank_pool import RankPool

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
os.environ["OVERLAP_MTP_CHECK_LAYOUTS"] = "1"  # of ranks and programs, too
torch.set_num_threads(1)  # tests' tensors are tiny: on busy cores, a second thread takes three times the time
settings.register_profile("overlap_mtp", deadline=None)  # a first example may compile kernels
settings.load_profile("overlap_mtp")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Eight gloo ranks. They end with the module: gloo's threads poll a hundred times a second for every group."""
    with RankPool(8) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def eight() -> Iterator[RankPool]:
    """The same without groups of fewer ranks."""
    with RankPool(8, sizes=()) as all_ranks:
        yield all_ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Four gloo ranks, for tests that need no more."""
    with RankPool(4) as four:
        yield four


@pytest.fixture(scope="session")
def gpu_pool() -> Iterator[RankPool]:
    """One NCCL rank for each GPU, or OVERLAP_MTP_GPU_RANKS of them, which share GPUs."""
    size = int(os.environ.get("OVERLAP_MTP_GPU_RANKS", torch.cuda.device_count()))
    if not torch.cuda.is_available() or size < 2:
        pytest.skip("needs two or more GPUs, or OVERLAP_MTP_GPU_RANKS on one")
    with RankPool(size, "nccl") as ranks:
        yield ranks


@pytest.fixture
def uninstalled() -> Iterator[None]:
    """Take the drop-in for Megatron-LM out after the test."""
    yield
    from overlap_mtp import megatron as drop_in  # here: few tests need it

    drop_in.uninstall()
    drop_in.reset_status()
