"""The learnable Fourier transform: exact at first, in both directions, and trainable."""

import pytest
import torch

from structlin.nn import MonarchFourier

LENGTHS = [4, 6, 64, 180, 224, 230, 257 * 2]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_it_starts_as_the_exact_transform(length, inverse):
    x = torch.randn(3, 5, length, dtype=torch.complex128)
    expected = torch.fft.ifft(x) if inverse else torch.fft.fft(x)
    found = MonarchFourier(length, inverse, dtype=torch.complex128)(x)
    assert torch.linalg.norm(found - expected) <= 1e-13 * torch.linalg.norm(expected)
    single = MonarchFourier(length, inverse)(x.to(torch.complex64))
    assert torch.linalg.norm(single - expected) <= 1e-6 * torch.linalg.norm(expected)


def test_its_inverse_undoes_it_and_its_weights_are_few():
    there, back = MonarchFourier(224), MonarchFourier(224, inverse=True)
    x = torch.randn(7, 224, dtype=torch.complex64)
    assert torch.allclose(back(there(x)), x, atol=1e-5)
    assert sum(p.numel() for p in there.parameters()) == 224 * (14 + 16)


def test_a_disturbed_transform_learns_itself_again():
    torch.manual_seed(0)
    layer = MonarchFourier(16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        x = torch.randn(64, 16, dtype=torch.complex64)
        loss = (layer(x) - torch.fft.fft(x)).abs().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


@pytest.mark.parametrize(("length", "near"), [(7, "6"), (1, "4"), (101, "100"), (0, "4")])
def test_a_length_that_does_not_split_is_an_error_with_the_nearest(length, near):
    with pytest.raises(ValueError, match=rf"length={length} is no product .* is: {near}$"):
        MonarchFourier(length)


def test_a_real_type_is_an_error():
    with pytest.raises(ValueError, match=r"dtype=torch\.float32 is given; allowed: torch\.complex64"):
        MonarchFourier(8, dtype=torch.float32)


@pytest.mark.parametrize("length", [4, 12, 35])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_matrix_and_its_parts_are_what_rows_are_multiplied_by(length: int, inverse: bool) -> None:
    transform = MonarchFourier(length, inverse, dtype=torch.complex128)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in transform.parameters():
            weight += 0.1 * torch.randn_like(weight)
    whole = transform(torch.eye(length, dtype=torch.complex128))
    places = torch.tensor([length - 1, 0, 2])
    torch.testing.assert_close(transform.matrix(), whole)
    torch.testing.assert_close(transform.matrix(rows=places), whole[places])
    torch.testing.assert_close(transform.matrix(columns=places), whole[:, places])
    with pytest.raises(ValueError, match="allowed: one of them"):
        transform.matrix(places, places)


def test_gradients_of_a_part_are_those_of_the_whole() -> None:
    transform, places = MonarchFourier(12, dtype=torch.complex128), torch.tensor([1, 5, 11])
    d = torch.randn(12, 3, dtype=torch.complex128)
    parts = torch.autograd.grad(transform.matrix(columns=places), tuple(transform.parameters()), d)
    whole = transform(torch.eye(12, dtype=torch.complex128))[:, places]
    torch.testing.assert_close(parts, torch.autograd.grad(whole, tuple(transform.parameters()), d))
