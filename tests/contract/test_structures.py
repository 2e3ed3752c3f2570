"""Every registered structure, held to one contract."""

import pytest

from structlin.testing import CONTRACT, examples


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize(
    ("spec", "shape"), examples(), ids=lambda v: v if isinstance(v, str) else str(v).replace(" ", "")
)
def test_contract(spec, shape, promise, device):
    promise(spec, shape, device)
