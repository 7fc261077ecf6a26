"""GPUs as their data sheets give them, and what an hour of them may cost."""

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
    node_bytes: float  # to the other GPUs of the machine (NVLink; the 4090 has PCIe alone)
    network_bytes: float  # to other machines
    price: float | None = None  # USD an hour, an assumption: see PRICED

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * GIB


# On-demand list prices as copies of them said (A100, H100 and B200 in machines of 8: lambda.ai; H200: akash.network;
# 4090: runpod.io, of May). Other lists of the time differ by a factor of up to 3: --price gives one's own.
PRICED = "September 2026"
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="4090", memory_gib=24, flops=165e12, node_bytes=25e9, network_bytes=12.5e9, price=0.69),
        Gpu(name="a100-40", memory_gib=40, flops=312e12, node_bytes=300e9, network_bytes=25e9, price=1.99),
        Gpu(name="a100-80", memory_gib=80, flops=312e12, node_bytes=300e9, network_bytes=25e9, price=2.79),
        Gpu(name="h100", memory_gib=80, flops=989e12, node_bytes=450e9, network_bytes=50e9, price=3.99),
        Gpu(name="h200", memory_gib=141, flops=989e12, node_bytes=450e9, network_bytes=50e9, price=4.45),
        Gpu(name="b200", memory_gib=180, flops=2250e12, node_bytes=900e9, network_bytes=50e9, price=6.69),
    )
}
