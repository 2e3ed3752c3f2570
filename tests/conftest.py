"""Where the tests run: on the CPU, or on the device named by STRUCTLIN_TEST_DEVICE."""

import os

import pytest


@pytest.fixture(scope="session")
def device():
    return os.environ.get("STRUCTLIN_TEST_DEVICE", "cpu")
