"""Generate images of chosen classes.

    python tools/sample.py --tokenizer runs/quickstart/tokenizer --transformer runs/quickstart/transformer \\
        --classes 0 3 --count 8 --output samples
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from PIL import Image

from ibq.api import generate, load_tokenizer, load_transformer, trained_on
from ibq.config import UserError, exit_on_user_error
from ibq.progress import progress_bar, say
from ibq.training.checkpoint import weights_hash
from ibq.training.run import set_up_torch
from tools.options import add_device_options, autocast_of, device_of


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Image i of a class is drawn with seed SEED + i. On a given device and precision it depends on "
        "the checkpoints, class, seed and sampler settings alone.",
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add("--transformer", required=True, help="the same for the transformer")
    add("--output", required=True, type=Path, help="folder for PNG files and samples.npz")
    add("--classes", type=int, nargs="+", help="class numbers (default: all)")
    add("--count", type=int, default=8, help="images per class")
    add("--guidance-scale", type=float, default=2.0, help="classifier-free guidance; 1 switches it off")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="only the k likeliest codes; 0 allows all")
    add("--top-p", type=float, default=1.0, help="only the likeliest codes up to this probability")
    add("--seed", type=int, default=0)
    add_device_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    arguments = parse(argv)
    if arguments.count < 1:
        raise UserError(f"--count must be at least 1, got {arguments.count}")
    set_up_torch(training=False)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device_of(arguments))
    transformer = load_transformer(arguments.transformer, device=device_of(arguments))
    if tokenizer.quantizer.num_codes != transformer.config.vocab_size:
        raise UserError(
            f"{arguments.transformer}: knows {transformer.config.vocab_size} codes, the tokenizer "
            f"{tokenizer.quantizer.num_codes}; give the tokenizer that the transformer was trained on"
        )
    wanted = trained_on(arguments.transformer)
    if wanted is not None and wanted != weights_hash(tokenizer.state_dict()):
        say(f"WARNING: {arguments.transformer} was trained on codes of another tokenizer than {arguments.tokenizer}")
    classes = arguments.classes if arguments.classes is not None else range(transformer.config.num_classes)
    labels = [label for label in classes for _ in range(arguments.count)]
    seeds = [arguments.seed + i for _ in classes for i in range(arguments.count)]
    with progress_bar("sample", len(labels), "image") as progress, autocast_of(arguments):
        try:
            images = generate(
                tokenizer,
                transformer,
                labels,
                seed=seeds,
                guidance_scale=arguments.guidance_scale,
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                progress=lambda done, _total: progress.update(done - progress.n),
            )
        except ValueError as error:
            raise UserError(str(error)) from error
    write_images(arguments.output, images.permute(0, 2, 3, 1).numpy(), labels, seeds)


def write_images(folder: Path, images: np.ndarray, labels: Sequence[int], seeds: Sequence[int]) -> None:
    """Write PNG files, and an .npz with `arr_0` uint8 [N, H, W, 3] and `arr_1` the classes (ADM's layout)."""
    folder.mkdir(parents=True, exist_ok=True)
    for image, label, seed in zip(images, labels, seeds, strict=True):
        Image.fromarray(image).save(folder / f"class{label:04d}_seed{seed:06d}.png")
    np.savez(folder / "samples.npz", images, np.asarray(labels, dtype=np.int64))
    print(f"{len(images)} images in {folder}")


if __name__ == "__main__":
    exit_on_user_error(main)
