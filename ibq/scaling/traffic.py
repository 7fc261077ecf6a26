"""What each rank sends per step, and how long that takes; see `ibq.scaling.layouts` for the formulas in words."""

from dataclasses import dataclass

from ibq.models.transformer import TransformerConfig
from ibq.scaling.hardware import CPU_ADAM_ELEMENTS, DISK_BYTES, HOST_BYTES, Gpu
from ibq.scaling.layouts import Layout, Training, numerics
from ibq.scaling.memory import Network
from ibq.scaling.transformer import checkpointing, recomputed_blocks


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes a rank sends per step: between machines or within one, and to and from host memory and disk."""

    data: float  # gradients and weights, over the ranks that see different data; beside the computation
    data_ranks: int  # of the group that `data` goes around
    copies: float = 0.0  # of it, between the groups of a hybrid layout
    tensor: float = 0.0  # activations, between the parts of a block: the computation waits
    host: float = 0.0
    disk: float = 0.0
    cpu_elements: float = 0.0  # that the host updates

    @property
    def sent(self) -> float:
        """Bytes sent to other GPUs."""
        return self.data + self.copies + self.tensor


def ring(ranks: int) -> float:
    """The share of a tensor that each rank sends in a reduce-scatter or an all-gather over so many."""
    return (ranks - 1) / ranks


def parameter_traffic(network: Network, layout: Layout, training: Training) -> Traffic:
    """What the weights and gradients of a network cost."""
    size = 2 if training.precision == "bf16" else 4
    passes, n = training.accumulation(layout), layout.shard
    elements, root = network.elements, network.root
    if layout.kind == "local" or (layout.kind == "zero" and layout.stage == 0):
        return Traffic(data=2 * ring(layout.data) * 4 * elements, data_ranks=layout.data)
    if layout.kind == "fsdp":
        gathered = (2 if layout.reshards else 1) * size * (elements - root) + 4 * root
        reductions = passes if layout.reduces_each else 1
        data = ring(n) * (passes * gathered + reductions * 4 * elements)
        copies = reductions * 2 * ring(layout.copies) * 4 * elements / n
        moved = passes * gathered + reductions * 4 * elements
        host = moved / n if layout.offload_optimizer != "none" else 0.0
        updated = elements / n if host else 0.0
        return Traffic(data=data, data_ranks=n, copies=copies, host=host, cpu_elements=updated)
    gradient = 2 if layout.reduce_dtype == "bf16" else 4
    once = gradient if size == 4 else 2 * gradient  # DeepSpeed's stage 1 with bf16 reduces by an all-reduce
    sent = {1: once + size, 2: gradient * passes + size, 3: passes * (gradient + 2 * size)}[layout.stage]
    data = ring(n) * elements * sent
    host = disk = updated = 0.0
    if layout.offload_optimizer != "none":
        host, updated = (4 * passes + size) * elements / n, elements / n
    if layout.offload_optimizer == "nvme":
        # Masters, moments and average are read and written once.
        disk += 2 * (4 + training.moments + 4 * training.ema) * elements / n
    if layout.offload_parameters != "none":
        host += passes * 2 * size * elements / n
    if layout.offload_parameters == "nvme":
        disk += passes * 2 * size * elements / n
    return Traffic(data=data, data_ranks=n, host=host, disk=disk, cpu_elements=updated)


def tensor_traffic(config: TransformerConfig, layout: Layout, training: Training) -> float:
    """Bytes of activations that a rank sends per step under tensor parallelism."""
    if layout.tensor == 1:
        return 0.0
    values = numerics(layout, training)
    stream = training.micro_batch * config.num_tokens * config.model_width
    again = sum(recomputed_blocks(config)) if checkpointing(config) == "full" else 0
    in_blocks = (4 * config.depth + 2 * again) * values.compute * stream
    ends = 2 * values.root * stream  # the embedding's output and the gradient of the head's input
    return training.accumulation(layout) * 2 * ring(layout.tensor) * (in_blocks + ends)


def exposed_seconds(traffic: Traffic, layout: Layout, gpu: Gpu, compute: float) -> float:
    """Seconds that a step takes beyond `compute` seconds of computation.

    What goes around over data-parallel ranks runs beside the computation and counts where it takes longer; activations
    of tensor parallelism, disks and the host's update are waited for.
    """
    per_node = layout.gpus_per_node

    def seconds(size: float, ranks: int, stride: int) -> float:
        if ranks * stride <= per_node:
            return size / gpu.node_bytes
        # Rings over all members in a machine use the network of each of them.
        members = max(1, per_node // stride)
        return size / min(gpu.node_bytes, members * gpu.network_bytes)

    tensor = layout.tensor
    beside = seconds(traffic.data, traffic.data_ranks, tensor)
    beside += seconds(traffic.copies, layout.copies, layout.shard * tensor)
    beside = max(beside, traffic.host / HOST_BYTES)
    on_node = min(per_node, layout.gpus)
    waited = seconds(traffic.tensor, tensor, 1)
    waited += on_node * traffic.disk / DISK_BYTES + on_node * traffic.cpu_elements / CPU_ADAM_ELEMENTS
    return waited + max(0.0, beside - compute)
