"""GPUs as their data sheets give them."""

from dataclasses import dataclass

GIB = 2**30
# Assumptions about what is around the GPUs, bytes or elements per second.
HOST_BYTES = 25e9  # between a GPU and its machine's memory
DISK_BYTES = 6e9  # of a machine's NVMe disks together
CPU_ADAM_ELEMENTS = 2e9  # updated by a machine's processors together


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU; bandwidths are bytes per second in one direction."""

    name: str
    memory_gib: float
    flops: float  # per second, dense bf16
    node_bytes: float  # to the other GPUs of the machine (NVLink)
    network_bytes: float  # to other machines

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * GIB


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100-40", memory_gib=40, flops=312e12, node_bytes=300e9, network_bytes=25e9),
        Gpu(name="a100-80", memory_gib=80, flops=312e12, node_bytes=300e9, network_bytes=25e9),
        Gpu(name="h100", memory_gib=80, flops=989e12, node_bytes=450e9, network_bytes=50e9),
        Gpu(name="h200", memory_gib=141, flops=989e12, node_bytes=450e9, network_bytes=50e9),
        Gpu(name="b200", memory_gib=180, flops=2250e12, node_bytes=900e9, network_bytes=50e9),
    )
}
