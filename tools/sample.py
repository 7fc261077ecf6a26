"""Generate images of chosen classes, or a balanced set for evaluation.

    python tools/sample.py --tokenizer runs/quickstart/tokenizer --transformer runs/quickstart/transformer \\
        --classes 0 3 --count 8 --output samples
    torchrun --nproc-per-node 8 tools/sample.py --tokenizer runs/tokenizer_16384 --transformer runs/ar_b \\
        --total 50000 --precision bf16 --output samples_b
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from ibq import dist
from ibq.api import decode_in_blocks, load_tokenizer, load_transformer, trained_on
from ibq.config import UserError, exit_on_user_error
from ibq.guidance import SCHEDULES
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.progress import progress_bar, say
from ibq.sampling import LARGEST_SEED, SamplerConfig, sample_codes
from ibq.training.checkpoint import weights_hash
from ibq.training.provenance import git_state
from ibq.training.run import set_up_torch
from tools.lib import ROOT
from tools.lib.options import add_device_options, device_of
from tools.lib.sample import files as sample_files

MOST_PNG = 1_000  # images that are written as files of their own unless --files says so
EPILOG = """\
Image i of a class is drawn with seed SEED + i. On a given device and precision it depends on the checkpoints, class,
seed and sampler settings alone: not on the number of processes, nor on interruptions, after which the same command goes
on. OUTPUT gets samples.npz (arr_0 uint8 [N, H, W, 3] and arr_1 the classes: ADM's form, which tools/evaluate.py and
other evaluators read), samples.json (what made them), and the images as PNG files or in tar shards.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", required=True, help="run folder, its `best` folder, or a published .ckpt file")
    add("--transformer", required=True, help="the same for the transformer")
    add("--output", required=True, type=Path, help="folder; all processes must see it")
    add("--classes", type=int, nargs="+", help="class numbers (default: all)")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--count", type=int, help="images per class (default: 8)")
    amount.add_argument("--total", type=int, help="images in all, equally many of every class")
    add("--guidance-scale", type=float, default=2.0, help="classifier-free guidance; 1 switches it off (default: 2)")
    add("--guidance-schedule", choices=SCHEDULES, default="constant", help="over the image's codes; ibq/guidance.py")
    add("--guidance-power", type=float, default=2.75, help="of power-cosine (default: 2.75)")
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("A", "B"), help="of interval")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="only the k likeliest codes; 0 allows all")
    add("--top-p", type=float, default=1.0, help="only the likeliest codes up to this probability")
    add("--seed", type=int, default=0)
    add("--rows", type=int, default=16, help="images drawn together (default: 16); others may round differently")
    add("--compile", action="store_true", help="compile the step: minutes at first, faster then on a GPU")
    add("--files", choices=["png", "shards", "none"], help=f"beside the .npz (default: png up to {MOST_PNG:,} images)")
    add("--fresh", action="store_true", help="start over: remove what this tool has written to OUTPUT before")
    add_device_options(parser, precisions=("fp32", "bf16", "int8"))
    return parser.parse_args(argv)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which images are drawn: piece by piece, each of some blocks."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    piece: int  # images of one

    @property
    def pieces(self) -> int:
        """How many there are."""
        return -(-len(self.labels) // self.piece)

    @property
    def names(self) -> list[str]:
        """Of the images' files."""
        pairs = zip(self.labels, self.seeds, strict=True)
        return [f"class{label:04d}_seed{seed:06d}" for label, seed in pairs]

    def part(self, number: int) -> slice:
        """Which images are a piece's."""
        return slice(number * self.piece, min((number + 1) * self.piece, len(self.labels)))


def request_of(arguments: argparse.Namespace, num_classes: int) -> Request:
    """The images that the options name; UserError for impossible ones."""
    classes = list(arguments.classes if arguments.classes is not None else range(num_classes))
    count = 8 if arguments.count is None else arguments.count
    if arguments.total is not None:
        count, rest = divmod(arguments.total, len(classes))
        if rest:
            raise UserError(
                f"--total: {arguments.total} images cannot be equally many of {len(classes)} classes; "
                f"use {arguments.total - rest} or {arguments.total - rest + len(classes)}"
            )
    if len(set(classes)) < len(classes):
        raise UserError("--classes: one is there twice; ask for more images of it by --count")
    if count < 1:
        raise UserError(f"{'--total' if arguments.total is not None else '--count'} must be at least 1 image a class")
    if not 0 <= arguments.seed <= LARGEST_SEED - count:
        raise UserError(f"--seed: {arguments.seed} is out of range; use 0 to {LARGEST_SEED - count}")
    for label in classes:
        if not 0 <= label < num_classes:
            raise UserError(f"--classes: {label} is out of range; use 0 to {num_classes - 1}")
    return Request(
        labels=tuple(label for label in classes for _ in range(count)),
        seeds=tuple(arguments.seed + i for _ in classes for i in range(count)),
        piece=max(1, 256 // arguments.rows) * arguments.rows if arguments.rows > 0 else 1,
    )


def sampler_of(arguments: argparse.Namespace) -> SamplerConfig:
    """The sampler that the options describe; UserError for impossible ones."""
    try:
        return SamplerConfig(
            guidance_scale=arguments.guidance_scale,
            guidance_schedule=arguments.guidance_schedule,
            guidance_power=arguments.guidance_power,
            guidance_interval=tuple(arguments.guidance_interval),
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            rows_per_block=arguments.rows,
            precision=arguments.precision,
            compile=arguments.compile,
        )
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    arguments = parse(argv)
    sampler = sampler_of(arguments)
    device_of(arguments)  # names the option if the device is not there
    set_up_torch(training=False)
    device = dist.setup(arguments.device)
    tokenizer = load_tokenizer(arguments.tokenizer, device=device)
    transformer = load_transformer(arguments.transformer, device=device)
    hashes = {"tokenizer": weights_hash(tokenizer.state_dict()), "transformer": weights_hash(transformer.state_dict())}
    check_pair(arguments, tokenizer, transformer, hashes["tokenizer"])
    request = request_of(arguments, transformer.config.num_classes)
    plan = {**hashes, "sampler": asdict(sampler), "labels_sha256": weights_hash(_as_tensors(request))}
    plan |= {"images": len(request.labels), "piece": request.piece}
    on_main(lambda: sample_files.begin(arguments.output, plan, fresh=arguments.fresh))
    if (arguments.output / sample_files.PIECES).exists():
        draw(request, tokenizer, transformer, sampler, arguments.output)
        on_main(lambda: finish(request, arguments, plan))
    dist.barrier()
    if dist.is_main():
        print(f"{len(request.labels)} images in {arguments.output}")
    dist.shutdown()


def check_pair(arguments: argparse.Namespace, tokenizer: Tokenizer, transformer: Transformer, found: str) -> None:
    """UserError for a tokenizer that the transformer cannot be used with, a warning for another than its own."""
    if tokenizer.quantizer.num_codes != transformer.config.vocab_size:
        raise UserError(
            f"{arguments.transformer}: knows {transformer.config.vocab_size} codes, the tokenizer "
            f"{tokenizer.quantizer.num_codes}; give the tokenizer that the transformer was trained on"
        )
    wanted = trained_on(arguments.transformer)
    if wanted is not None and wanted != found and dist.is_main():
        say(f"WARNING: {arguments.transformer} was trained on codes of another tokenizer than {arguments.tokenizer}")


def draw(request: Request, tokenizer: Tokenizer, transformer: Transformer, sampler: SamplerConfig, folder: Path):
    """Draw this rank's share of the missing pieces; each is a file that is whole or absent."""
    dist.barrier()  # all see the same pieces before the first is added
    missing = sample_files.missing_pieces(folder, request.pieces)
    dist.barrier()
    own = missing[dist.rank() :: dist.world_size()]
    decoder = sampler.decoder(transformer) if own else None
    device = next(tokenizer.parameters()).device
    images = sum(len(request.labels[request.part(number)]) for number in own)
    with progress_bar("sample", images, "image", disable=not dist.is_main()) as progress:
        for number in own:
            part, start = request.part(number), progress.n
            codes = sample_codes(
                decoder,
                request.labels[part],
                request.seeds[part],
                sampler,
                progress=lambda done, _all, start=start: progress.update(start + done - progress.n),
            )
            with torch.autocast(device.type, torch.bfloat16, enabled=sampler.precision != "fp32"):
                pixels = decode_in_blocks(tokenizer, codes)
            sample_files.write_piece(folder, number, pixels.permute(0, 2, 3, 1).numpy())
    dist.barrier()


def finish(request: Request, arguments: argparse.Namespace, plan: dict) -> None:
    """Put the pieces together."""
    count = len(request.labels)
    form = arguments.files or ("png" if count <= MOST_PNG else "shards")
    info = {"plan": plan, "tokenizer": plan["tokenizer"], "transformer": plan["transformer"]}
    info |= {"sampler": plan["sampler"], "seed": arguments.seed, "classes": len(set(request.labels)), "count": count}
    info |= {"precision": arguments.precision, "git": git_state(ROOT), "torch": torch.__version__}
    info |= {"tokenizer_path": str(arguments.tokenizer), "transformer_path": str(arguments.transformer)}
    names = [str(number) for number in range(max(request.labels) + 1)]
    with progress_bar("write", (1 if form == "none" else 2) * count, "image") as progress:
        sample_files.write_set(
            arguments.output,
            request.pieces,
            request.labels,
            request.names,
            info,
            classes=names,
            form=form,
            advance=progress.update,
        )


def on_main(action) -> None:
    """Do something on rank 0; its UserError is raised on every rank."""
    problem = ""
    if dist.is_main():
        try:
            action()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--output: cannot be written ({error}); make room or give another folder, then start again"
    if problem := dist.text_from_main(problem):
        raise UserError(problem)


def _as_tensors(request: Request) -> dict[str, torch.Tensor]:
    pairs = {"labels": request.labels, "seeds": request.seeds}
    return {name: torch.from_numpy(np.asarray(values, dtype=np.int64)) for name, values in pairs.items()}


if __name__ == "__main__":
    exit_on_user_error(main)
