"""Layers in a model that is trained under DDP and FSDP2; rank 0 writes the weights: WRAPPER/KIND/NAME.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/layer_worker.py RESULT

Everything is set up by PyTorch's own calls, as in other people's code.
"""

import sys

import torch
import torch.distributed as torch_dist
from safetensors.torch import save_file
from support.layers import LAYERS, Model, batches, train
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ibq import dist


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (torch_dist.get_world_size(),))
    if list(model.quantizer.parameters()):
        fully_shard(model.quantizer, mesh=mesh)
        register_fsdp_forward_method(model.quantizer, "encode")
    return fully_shard(model, mesh=mesh)


def trained(name: str, wrap) -> dict[str, torch.Tensor]:
    model = Model(name).double()
    model.quantizer.mean_over_ranks = dist.mean_over_ranks
    train(wrap(model), torch_dist.get_rank(), torch_dist.get_world_size())
    codes = model.quantizer.encode(batches()[0][..., :4])
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) | {"codes": codes}


def main() -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo")
    found = {
        f"{title}/{kind}/{name}": value.contiguous()
        for title, wrap in (("ddp", DistributedDataParallel), ("fsdp", shard))
        for kind in LAYERS
        for name, value in trained(kind, wrap).items()
    }
    if torch_dist.get_rank() == 0:
        save_file(found, f"{sys.argv[1]}.safetensors")
    torch_dist.barrier()
    torch_dist.destroy_process_group()


if __name__ == "__main__":
    main()
