"""Every registered structure, held to one contract, and padded where it does not have all widths."""

import pytest

from structlin.testing import CONTRACT, examples, padded_examples


@pytest.mark.parametrize("promise", CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize(
    ("spec", "shape"),
    examples() + padded_examples(),
    ids=lambda v: v if isinstance(v, str) else str(v).replace(" ", ""),
)
def test_contract(spec, shape, promise, device):
    promise(spec, shape, device)
