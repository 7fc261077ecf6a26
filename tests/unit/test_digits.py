"""tools/digits.py: shards that the project reads, of pictures that are the digits."""

import json

import numpy as np
import pytest
import torch

from ibq.data.images import ImageDataset
from ibq.data.shards import open_images
from tools import digits


@pytest.fixture
def values(monkeypatch):
    """In place of scikit-learn's: 12 pictures, each all of one value but for a corner."""
    images = np.zeros((12, 8, 8)) + np.arange(12)[:, None, None]
    images[:, 0, 0] = digits.BRIGHTEST
    monkeypatch.setattr(digits, "digits", lambda: (images, np.arange(12) % 10))
    return images


def read(place):
    index = open_images(str(place))
    images, labels, bad = ImageDataset(index, 32).batch(range(len(index)))
    assert not bad
    return index, images, labels


def test_every_fifth_picture_is_held_out(values, tmp_path):
    digits.main([str(tmp_path)])
    assert json.loads((tmp_path / "classes.json").read_text()) == list("0123456789")
    index, train, labels = read(tmp_path / "train-*.tar")
    assert index.classes == tuple("0123456789") or list(index.classes) == list("0123456789")
    assert labels.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 0, 1]
    _, held_out, labels = read(tmp_path / "val-*.tar")
    assert labels.tolist() == [4, 9] and held_out.shape == (2, 3, 32, 32)
    assert (held_out[:, :, 20:, 20:].float().mean((1, 2, 3)) - torch.tensor([4, 9]) * 255 / 16).abs().max() < 1
    assert (held_out[:, :, 0, 0] > 240).all() and (train[:, 0] == train[:, 2]).all()


def test_scikit_learns_digits():
    pytest.importorskip("sklearn")
    images, labels = digits.digits()
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == digits.BRIGHTEST
    assert np.bincount(labels).min() > 170 and len(np.bincount(labels)) == 10
