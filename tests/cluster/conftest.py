"""Fixtures of the cluster tests."""

from collections.abc import Iterator

import pytest
from cluster_scripts import Head, start_head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of one CPU, started by head.sh."""
    yield from start_head("head.sh", "--num-cpus=1")


@pytest.fixture
def autoscaling_head() -> Iterator[Head]:
    """A head that grows by up to two nodes, started by autoscaling.sh."""
    yield from start_head("autoscaling.sh")
