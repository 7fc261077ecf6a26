"""Two processes quantize half a batch each, with the statistics of the whole; rank 0 writes what came of it.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/quantizer_worker.py RESULT

RESULT.safetensors: KIND/NAME -> losses (mean over the ranks), codes and latents of the whole batch, gradients.
"""

import sys

import torch
from safetensors.torch import save_file
from support.quantizer import KINDS, build, draw_latents, objective
from torch.nn.parallel import DistributedDataParallel

from ibq import dist
from ibq.config import exit_on_user_error


def quantize(kind: str) -> dict[str, torch.Tensor]:
    quantizer = build(KINDS[kind].config).double()
    quantizer.mean_over_ranks = dist.mean_over_ranks
    trained = list(quantizer.named_parameters())
    parallel = DistributedDataParallel(quantizer, broadcast_buffers=False) if trained else quantizer
    z, upstream = (draw_latents(batch=4, seed=seed).double().chunk(2)[dist.rank()] for seed in (1, 2))
    z.requires_grad_()
    out = parallel(z)
    objective(out, upstream).backward()
    found = {f"loss/{name}": dist.all_reduce_mean(loss.detach().clone()) for name, loss in out.losses.items()}
    found |= {f"metric/{name}": dist.all_reduce_mean(value.clone()) for name, value in out.metrics.items()}
    found |= {f"gradient/{name}": parameter.grad for name, parameter in trained}
    # The ranks' objectives are averaged.
    found["gradient/z"] = dist.all_gather_rows(z.grad) / dist.world_size()
    found["codes"] = dist.all_gather_rows(out.codes)
    found["latents"] = dist.all_gather_rows(out.latents.detach())
    return {f"{kind}/{name}": value.contiguous() for name, value in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    dist.setup("cpu")
    found = {name: value for kind in KINDS for name, value in quantize(kind).items()}
    if dist.is_main():
        save_file(found, f"{sys.argv[1]}.safetensors")
    dist.shutdown()


if __name__ == "__main__":
    exit_on_user_error(main)
