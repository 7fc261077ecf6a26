"""Every Triton kernel and variant, compiled for GPUs that need not be there: registers and shared memory.

Triton compiles ahead of time down to machine code; ptxas, which comes with it, reports what a kernel uses. A kernel
that spills registers is slow, and one that needs more shared memory than a processor has does not start.
`python tests/gpu/test_triton_compile.py` prints the table.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

pytest.importorskip("triton", reason="triton is installed with the CUDA builds of torch only")
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ibq.ops import triton_common as common
from ibq.ops import triton_decode_step as decode_step
from ibq.ops import triton_draw as draw
from ibq.ops import triton_group_norm_silu as group_norm_silu
from ibq.ops import triton_index_backprop as index_backprop
from ibq.ops import triton_linear_cross_entropy as cross_entropy
from ibq.ops.triton_common import GRADIENT_TILES, ONE_PRODUCT_TILES, TWO_PRODUCT_TILES, Tile

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")
SHARED_LIMIT_KIB = {80: 163, 90: 227}  # per block: A100, H100 (CUDA C++ programming guide, compute capabilities)
PRECISIONS = ("ieee", "tf32x3", "tf32", "bfloat16")
TABLES = ("statistics", "usage", "centres", "logit gradients")  # kernels that read a table of products as well
# Arguments that the launchers keep to multiples of 16: padded widths, chunk borders, lengths of splits.
MULTIPLES_OF_16 = {"width", "columns", "split_length", "out_stride", "a_stride", "chunk_start"}
OPERANDS = {"tokens_ptr", "codebook_ptr", "grad_latents_ptr", "hidden_ptr", "weight_ptr", "a_ptr", "b_ptr"}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel with its flags, and what it takes its tiles from."""

    name: str
    function: object
    tiles: dict
    flags: dict
    writes_workspace: bool = False  # in the operands' dtype


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one compiled kernel uses."""

    registers: int
    spilled_bytes: int
    shared_kib: float
    instruction: str  # what the matrix products became


def kernels() -> list[Kernel]:
    gradients = {True: TWO_PRODUCT_TILES, False: ONE_PRODUCT_TILES}
    return [
        Kernel(name="statistics", function=index_backprop.statistics_kernel, tiles=ONE_PRODUCT_TILES, flags={}),
        Kernel(name="usage", function=index_backprop.usage_kernel, tiles=ONE_PRODUCT_TILES, flags={}),
        *(
            Kernel(
                name=f"centres{'' if latents else ', entropies only'}",
                function=index_backprop.centres_kernel,
                tiles=gradients[latents],
                flags={"HAS_LATENTS": latents},
            )
            for latents in (True, False)
        ),
        *(
            Kernel(
                name=f"logit gradients{'' if latents else ', entropies only'}",
                function=index_backprop.logit_gradients_kernel,
                tiles=gradients[latents],
                flags={"HAS_LATENTS": latents},
                writes_workspace=True,
            )
            for latents in (True, False)
        ),
        *(
            Kernel(
                name=f"product{', transposed' if transposed else ''}{'' if accumulate else ', split'}",
                function=common.product_kernel,
                tiles=GRADIENT_TILES,
                flags={"TRANSPOSED": transposed, "ACCUMULATE": accumulate},
            )
            for transposed in (False, True)
            for accumulate in (True, False)
        ),
        Kernel(
            name="head statistics", function=cross_entropy.head_statistics_kernel, tiles=ONE_PRODUCT_TILES, flags={}
        ),
        Kernel(
            name="head logit gradients",
            function=cross_entropy.head_logit_gradients_kernel,
            tiles=ONE_PRODUCT_TILES,
            flags={},
            writes_workspace=True,
        ),
    ]


def signature(kernel: Kernel, precision: str, constants: dict, whole_sizes: bool) -> tuple[dict, dict]:
    """Argument types and alignments as at a launch; `whole_sizes` makes N, K and V multiples of 16 too."""
    types, attributes = {}, {}
    for place, parameter in enumerate(kernel.function.params):
        name = parameter.name
        aligned = True
        if name in constants:
            types[name], aligned = "constexpr", False
        elif name.endswith("_ptr"):
            narrow = name in OPERANDS or (kernel.writes_workspace and name == "out_ptr")
            integers = {"targets_ptr": "*i64", "codes_ptr": "*i32"}
            types[name] = integers.get(name) or ("*bf16" if precision == "bfloat16" and narrow else "*fp32")
        elif name.startswith("inverse_"):
            types[name], aligned = "fp32", False
        else:
            types[name], aligned = "i32", whole_sizes or name in MULTIPLES_OF_16
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, attributes


def compiled(
    kernel: Kernel,
    precision: str,
    capability: int,
    *,
    tile: Tile | None = None,
    whole_sizes: bool = False,
    **sizes: int,
) -> Usage:
    """Compile one variant. `sizes` are arguments with a fixed value: Triton makes every argument of 1 a constant."""
    options = (tile or kernel.tiles[precision]).options()
    compile_options = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = kernel.flags | options | sizes | {"PRECISION": common.kernel_precision(precision)}
    types, attributes = signature(kernel, precision, constants, whole_sizes)
    return machine_code(kernel.function, types, constants, attributes, capability, compile_options)


def machine_code(
    function, types: dict, constants: dict, attributes: dict, capability: int, compile_options: dict
) -> Usage:
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = cache  # an empty cache: ptxas has to run, and to say what it found
        knobs.nvidia.dump_ptxas_log = True
        result = triton.compile(
            ASTSource(function, types, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=compile_options,
        )
    ptx = result.asm["ptx"]
    return Usage(
        registers=int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
        spilled_bytes=sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())),
        shared_kib=result.metadata.shared / 1024,
        instruction="wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "fma",
    )


def problems(usage: Usage, capability: int) -> list[str]:
    found = []
    if usage.spilled_bytes:
        found.append(f"{usage.spilled_bytes} bytes spilled")
    if usage.shared_kib > SHARED_LIMIT_KIB[capability]:
        found.append(f"{usage.shared_kib:.0f} KiB shared memory, the limit is {SHARED_LIMIT_KIB[capability]}")
    return found


def variants(kernel: Kernel) -> Iterator[tuple[str, int, Usage]]:
    for precision in (*PRECISIONS, *(["torch"] if kernel.name.startswith(TABLES) else [])):
        for capability in SHARED_LIMIT_KIB:
            yield precision, capability, compiled(kernel, precision, capability)


HEADING = f"{'kernel':32} {'precision':9} {'target':6} {'registers':>9} {'spilled':>7} {'shared KiB':>10}  products"


def row(kernel: Kernel, precision: str, capability: int, usage: Usage) -> str:
    return (
        f"{kernel.name:32} {precision:9} sm_{capability:<3} {usage.registers:9} {usage.spilled_bytes:7} "
        f"{usage.shared_kib:10.0f}  {usage.instruction}"
    )


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_no_spills_and_enough_shared_memory(kernel):
    print(f"\n{HEADING}")
    for precision, capability, usage in variants(kernel):
        line = row(kernel, precision, capability, usage)
        print(line)
        assert not problems(usage, capability), f"{line}: {problems(usage, capability)}"
        assert (usage.instruction == "fma") == (precision in ("ieee", "torch")), line


@pytest.mark.parametrize("kernel", kernels()[:2] + kernels()[-2:], ids=lambda kernel: kernel.name)
def test_sizes_that_are_multiples_of_16(kernel):
    """Triton compiles another version then. A sample: the targets and precisions that come closest to the limits."""
    for precision in ("tf32x3", "bfloat16"):
        usage = compiled(kernel, precision, 80, whole_sizes=True)
        assert not problems(usage, 80), row(kernel, precision, 80, usage)


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_sizes_of_one(kernel):
    """Triton turns arguments of 1 into constants, which have fewer methods than tensors."""
    names = {parameter.name for parameter in kernel.function.params}
    ones = dict.fromkeys(names & {"num_tokens", "num_codes", "rows", "length"}, 1)
    assert not problems(compiled(kernel, "tf32", 80, **ones), 80)


GROUP_NORM_KERNELS = [  # flags as at a launch, and whether a program has a tile of an image
    ("channel_sums_kernel", {"OF_GRADIENT": False}, True),
    ("channel_sums_kernel", {"OF_GRADIENT": True}, True),
    ("values_kernel", {"OF_GRADIENT": False, "HAS_SHORTCUT": False}, True),
    ("values_kernel", {"OF_GRADIENT": True, "HAS_SHORTCUT": True}, True),
    ("shortcut_kernel", {}, True),
    ("statistics_kernel", {"HAS_ADDED": True}, False),
    ("gradient_statistics_kernel", {}, False),
]


@pytest.mark.parametrize("channels", [96, 128, 512, 4096])
@pytest.mark.parametrize(("name", "flags", "of_image"), GROUP_NORM_KERNELS)
def test_group_norm_and_silu(name, flags, of_image, channels):
    function, tile = getattr(group_norm_silu, name), group_norm_silu._tile(channels)
    options = {"num_warps": tile.pop("num_warps") if of_image else 4, "num_stages": 3}
    constants = flags | (
        tile if of_image else {"STEP": group_norm_silu.STEP, "WIDTH": triton.next_power_of_2(channels // 32)}
    )
    types, attributes = {}, {}
    for place, parameter in enumerate(function.params):
        kind = "constexpr" if parameter.name in constants else "fp32" if parameter.name == "eps" else "i32"
        if parameter.name.endswith("_ptr"):
            images = parameter.name in ("x_ptr", "grad_ptr", "shortcut_ptr", "out_ptr") and of_image
            kind = "*bf16" if images else "*fp32"
        types[parameter.name] = kind
        if kind.startswith("*") or parameter.name == "channels":
            attributes[(place,)] = [["tt.divisibility", 16]]
    for capability in SHARED_LIMIT_KIB:
        usage = machine_code(function, types, constants, attributes, capability, options)
        assert not problems(usage, capability)
        assert not of_image or usage.registers <= 128, "two programs of 256 threads on a processor"


DECODE_KERNELS = [  # constants and warps as at a launch
    (decode_step.residual_norm_kernel, {"HAS_UPDATE": True, "COLUMNS": 2048}, 8),
    *((decode_step.attend_kernel, {"HEAD_DIM": size}, decode_step.TILE_WARPS) for size in (64, 128)),
    (decode_step.swiglu_kernel, {"COLUMNS": decode_step.GATES}, 4),
    (draw.draw_sums_kernel, {"GUIDED": True, "PART": draw.PART}, draw.PART_WARPS),
    (draw.draw_kernel, {"GUIDED": True, "PART": draw.PART, "PARTS": 64}, draw.PART_WARPS),
]
KINDS = {  # of those arguments that are neither in the model's precision nor whole numbers
    **dict.fromkeys(("rope_ptr", "scales_ptr", "highest_ptr"), "*fp32"),
    **dict.fromkeys(("position_ptr", "drawn_ptr"), "*i64"),
    **dict.fromkeys(("sums_ptr", "numbers_ptr"), "*fp64"),
    **dict.fromkeys(("eps", "scale", "temperature"), "fp32"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("function", "constants", "warps"), DECODE_KERNELS, ids=str)
def test_a_step_of_decoding(function, constants, warps, dtype):
    kind = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    if function is decode_step.attend_kernel:
        constants = constants | decode_step.tile(constants["HEAD_DIM"], dtype)
    types, attributes = {}, {}
    for place, parameter in enumerate(function.params):
        plain = kind if parameter.name.endswith("_ptr") else "i32"
        types[parameter.name] = "constexpr" if parameter.name in constants else KINDS.get(parameter.name, plain)
        if types[parameter.name] == kind or parameter.name in (
            "width",
            "hidden",
            "gate_stride",
            "norm_stride",
            "codes",
        ):
            attributes[(place,)] = [["tt.divisibility", 16]]
    for capability in SHARED_LIMIT_KIB:
        usage = machine_code(function, types, constants, attributes, capability, {"num_warps": warps, "num_stages": 3})
        print(function, constants, kind, capability, usage)
        assert not problems(usage, capability) and usage.registers <= 128


def test_the_check_can_fail():
    """Tiles that are too large are found out."""
    statistics = kernels()[0]
    wide = Tile(rows=128, columns=128, inner=32, warps=4, stages=2)
    assert "spilled" in " ".join(problems(compiled(statistics, "tf32", 80, tile=wide), 80))
    deep = Tile(rows=64, columns=64, inner=64, warps=8, stages=8)
    too_deep = compiled(statistics, "tf32", 80, tile=deep)
    assert "shared memory" in " ".join(problems(too_deep, 80))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiles_fit_each_other(precision):
    """The product reads whole inner steps of what whole tiles wrote, and chunks of 256 hold whole tiles."""
    inner = GRADIENT_TILES[precision].inner
    for tiles in (ONE_PRODUCT_TILES, TWO_PRODUCT_TILES, GRADIENT_TILES):
        tile = tiles[precision]
        assert tile.rows % inner == 0 and tile.columns % inner == 0
        assert 256 % tile.rows == 0 and 256 % tile.columns == 0


if __name__ == "__main__":
    print(HEADING)
    for each in kernels():
        for variant in variants(each):
            print(row(each, *variant), flush=True)
