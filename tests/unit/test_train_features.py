"""tools/train_features.py: a backbone that learns, and that a discriminator takes."""

import pytest
import torch
from support.training import picture, png, write_images

from ibq.config import UserError
from ibq.models.feature_discriminator import FeaturesDiscriminatorConfig
from ibq.models.frozen_features import FrozenFeatures
from ibq.models.vision_transformer import VisionTransformerConfig
from tools import train_features

SHAPE = {"width": 12, "depth": 2, "heads": 3, "patch": 4, "side": 16}


def train(folder, *more: str) -> None:
    places = ["--images", f"{folder}/train-*.tar", "--validation", f"{folder}/val-*.tar", "--device", "cpu"]
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train_features.main([*places, *shape, *more])
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


def test_a_backbone_is_trained_and_taken(tmp_path, capsys):
    write_images(tmp_path)
    files = [tmp_path / "out" / f"{name}.safetensors" for name in ("one", "same", "other")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        train(tmp_path, "--output", str(file), "--steps", "2", "--seed", str(seed))
    assert "balanced accuracy on 8 validation images" in capsys.readouterr().out
    config = {"backbone": VisionTransformerConfig(**SHAPE), "layers": (1, 2), "side": 16}
    found = [FrozenFeatures(FeaturesDiscriminatorConfig(**config, weights=str(file))) for file in files]
    assert found[0].identity == found[1].identity != found[2].identity
    untrained = FrozenFeatures(FeaturesDiscriminatorConfig(**config, weights="random"))
    assert found[0].identity != untrained.identity
    assert [layer.shape for layer in found[0](torch.zeros(2, 3, 16, 16))] == [(2, 12, 16)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--output", "file.pth"), "ends in .safetensors"),
        (("--output", "a.safetensors", "--width", "13"), "--width: 13 is no multiple of heads, 3"),
        (("--output", "a.safetensors", "--steps", "0"), "steps"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        train(tmp_path, *options)


def test_other_classes_of_the_validation_images_are_refused(tmp_path):
    """They would be counted as others by their numbers."""
    for place in ("train/apple", "train/pear", "val/pear", "val/plum"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.png").write_bytes(png(picture(1)))
    places = ("--images", str(tmp_path / "train"), "--validation", str(tmp_path / "val"))
    with pytest.raises(UserError, match=r"--validation: classes are matched by name with --images, but .*plum"):
        train(tmp_path, *places, "--output", str(tmp_path / "a.safetensors"))
