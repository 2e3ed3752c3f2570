"""Where the tests run: on the CPU, or on the device named by STRUCTLIN_TEST_DEVICE."""

import os

import pytest

from structlin.ops import choice


@pytest.fixture(scope="session")
def device():
    return os.environ.get("STRUCTLIN_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def own_choices(tmp_path_factory, monkeypatch):
    """No test sees the choices of backends of another, or of whoever runs it."""
    monkeypatch.setenv("STRUCTLIN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "no-choices"))
    choice.forget()
