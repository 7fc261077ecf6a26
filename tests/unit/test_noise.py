"""The counter-based generator against its published vectors, and uniform numbers of it."""

import pytest
import torch

from ibq.noise import philox, uniforms

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[torch.Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_vectors(counter, key, expected):
    assert [int(word) for word in philox(words(counter), words(key))] == [int(word) for word in words(expected)]


def test_a_number_depends_on_seed_and_position_alone():
    seeds = [0, 1, 7, 2**32, 2**63 - 1]
    table = uniforms(seeds, 300, "cpu")
    assert table.shape == (5, 300) and table.dtype == torch.float64
    assert torch.equal(uniforms(seeds[::-1], 20, "cpu"), table.flip(0)[:, :20])
    assert table.unique().numel() == table.numel()


def test_they_are_uniform_and_independent():
    table = uniforms(range(2_000), 500, "cpu")
    assert table.min() > 0 and table.max() < 1
    counts = torch.histc(table.float(), bins=1_000, min=0, max=1)
    squares = ((counts - 1_000) ** 2 / 1_000).sum()
    assert abs(squares - 999) < 5 * (2 * 999) ** 0.5
    for one, other in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:])):  # neighbouring seeds, and positions
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / one.numel() ** 0.5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_cuda():
    assert torch.equal(uniforms(range(64), 256, "cuda").cpu(), uniforms(range(64), 256, "cpu"))
