"""Every mixture of experts, held to its contract."""

import pytest

from structlin.testing import MIXTURE_CONTRACT, mixture_examples


@pytest.mark.parametrize("promise", MIXTURE_CONTRACT, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize(("spec", "shape"), mixture_examples(), ids=lambda v: str(v).replace(" ", ""))
def test_contract(spec, shape, promise, device):
    promise(spec, shape, device)
