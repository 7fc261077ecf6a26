"""IBQ in the place of the quantizer of `vector-quantize-pytorch`, in an autoencoder like that package's example."""

import json
import re
from pathlib import Path

import pytest
import torch
from support import ROOT
from support.processes import run_script

from ibq.quantizers import IBQ, AsVectorQuantize

RESULT = "tools/results/layer_1024-codes_cpu-2-cores_202611.json"
CODES, IMAGES, IBQ_NAME, THEIRS = 512, 600, "ibq.quantizers.IBQ", "vector-quantize-pytorch"


@pytest.mark.slow
def test_both_train_and_ibq_uses_more_of_its_codes(tmp_path: Path):
    file = tmp_path / "layer.json"
    result = run_script(
        *("tools/bench.py", "layer", "--codes", str(CODES), "--steps", "100", "--images", str(IMAGES)),
        *("--json", file),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads(file.read_text())
    print(result.stdout)
    found = figures["quantizers"]
    assert list(found) == [IBQ_NAME, "ibq.quantizers.VQ", THEIRS] and figures["images"] <= IMAGES
    ibq, theirs = found[IBQ_NAME], found[THEIRS]
    assert ibq["usage"] > theirs["usage"] and ibq["perplexity"] > theirs["perplexity"]
    assert ibq["l1"] < 1.5 * theirs["l1"]  # 1.26 at 1,000 steps
    for name, row in found.items():
        assert f"{row['usage']:.1%}" in next(line for line in result.stdout.splitlines() if line.startswith(name))


@pytest.mark.parametrize("shape, settings", [((2, 6, 8), {}), ((2, 8, 3, 4), {"accept_image_fmap": True})])
def test_the_same_shapes_and_types(shape: tuple[int, ...], settings: dict):
    from vector_quantize_pytorch import VectorQuantize

    z = torch.randn(shape)
    ours = AsVectorQuantize(IBQ(num_codes=16, dim=8))(z)
    theirs = VectorQuantize(dim=8, codebook_size=16, **settings)(z)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]


def test_the_page_has_the_figures_of_the_raw_file():
    figures = json.loads((ROOT / RESULT).read_text())
    section = (ROOT / "ibq/quantizers/README.md").read_text().split("## As a layer in your own code")[1]
    rows = re.findall(r"^\| .*?`(IBQ|VQ|VectorQuantize)` \| (\S+%) \| (\S+) \| (\S+) \|$", section, flags=re.M)
    expected = [
        (label, f"{row['usage']:.1%}", f"{row['perplexity']:.0f}", f"{row['l1']:.3f}")
        for label, row in zip(("IBQ", "VQ", "VectorQuantize"), figures["quantizers"].values(), strict=True)
    ]
    assert rows == expected
