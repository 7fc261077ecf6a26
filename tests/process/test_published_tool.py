"""The catalogue of published models, the one command for each, and what their page says of them."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from support import ROOT
from support.golden import golden_dir
from support.processes import run_script
from support.training import write_images

from ibq.config import UserError
from ibq.interop import seed_voken
from ibq.interop.catalogue import CATALOGUE
from ibq.interop.families import FAMILIES
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import IBQConfig
from tools import convert, evaluate, published, sample

PAGE = (ROOT / "ibq" / "interop" / "README.md").read_text()


@pytest.mark.parametrize("name", CATALOGUE)
def test_commands_are_understood(name, tmp_path):
    entry = CATALOGUE[name]
    measure = ["--reference", "r.npz"] if entry.is_transformer else ["--images", "val-*.tar"]
    argv = [name, "--output", str(tmp_path), *measure, "--processes", "2"]
    download, importing, *rest = published.commands(published.parse(argv))
    assert download[:4] == ["hf", "download", entry.repository, entry.file]
    arguments = convert.parse(importing[2:])
    assert arguments.family == entry.family in FAMILIES and arguments.file == tmp_path / entry.file
    if entry.is_transformer:
        drawn = sample.parse(rest[0][rest[0].index("tools/sample.py") + 1 :])
        assert (drawn.guidance_scale, drawn.temperature) == (entry.sampler.guidance_scale, entry.sampler.temperature)
        assert (drawn.top_k, drawn.top_p, drawn.total) == (0, 1.0, 50_000)
    else:
        assert arguments.resolution == entry.resolution
    last = rest[-1]
    assert last[:3] == ["torchrun", "--nproc-per-node", "2"]
    assert evaluate.parse(last[last.index("tools/evaluate.py") + 1 :]).json == tmp_path / f"{name}.json"


def test_a_tokenizer_from_its_file_to_its_figures(tmp_path):
    write_images(tmp_path / "data", count=4, validation=3)
    command = ["tools/published.py", "ibq-1024", "--output", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--file", str(golden_dir() / "tokenizer_small.ckpt"), "--resolution", "32"]
    done = run_script(*command, "--images", str(tmp_path / "data" / "val-*.tar"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "ibq-1024.json").read_text())
    assert record["image_count"] == 3 and record["num_codes"] == 128
    assert re.search(r"rfid +2\.2400 +-", done.stdout), done.stdout


def test_a_transformer_from_its_file_to_its_samples(tmp_path):
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=32, num_classes=3, depth=1)
    tokenizer = TokenizerConfig(
        channels=32,
        channel_multipliers=(1, 1, 1),
        res_blocks=1,
        attention_resolutions=(),
        latent_channels=16,
        quantizer=IBQConfig(num_codes=32, dim=16),
    )
    pair = (tokenizer, Tokenizer(tokenizer).state_dict())
    state = seed_voken.write_transformer(config, Transformer(config).state_dict(), pair)
    torch.save({"state_dict": state}, tmp_path / "ar.ckpt")
    command = ["tools/published.py", "ar-b", "--output", str(tmp_path / "out"), "--file", str(tmp_path / "ar.ckpt")]
    for _ in range(2):  # what is drawn already is not drawn again
        done = run_script(*command, "--total", "3", "--device", "cpu")
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out" / "ar-b-samples" / "samples.npz") as found:
        assert found["arr_0"].shape == (3, 64, 64, 3) and sorted(found["arr_1"]) == [0, 1, 2]


def test_mistakes_and_the_list(tmp_path, capsys):
    for argv, said in (
        (["ar-b", "--images", "x"], "--images: ar-b has no use"),
        (["ibq-1024", "--reference", "x"], "--reference: ibq-1024 has no use"),
        (["ar-b", "--total", "0"], "--total"),
        (["ibq-1024", "--file", str(tmp_path / "absent.ckpt"), "--output", str(tmp_path)], "exit code 2"),
    ):
        with pytest.raises(UserError, match=said):
            published.main(argv)
    published.main(["list"])
    assert len(capsys.readouterr().out.splitlines()) == len(CATALOGUE)


# --- The page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_page_has_a_row_for_every_model(name):
    entry = CATALOGUE[name]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    assert f"`{entry.repository}`" in row and f"`{entry.file}`" in row
    for figure in ("fid", "inception_score") if entry.is_transformer else ("rfid",):
        assert re.search(rf"\| {entry.reported[figure]:.2f}\b", row), figure
    if entry.is_transformer:
        assert f"{entry.sampler.guidance_scale:g} | {entry.sampler.temperature:.2f}" in row


def test_page_commands_are_those_of_the_tools():
    parsers = {
        "tools/convert.py": convert.parse,
        "tools/published.py": published.parse,
        "tools/sample.py": sample.parse,
    }
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]
    found = [line for line in lines if len(line) > 1 and line[1] in parsers]
    for line in found:
        parsers[line[1]](line[2:])
    assert {line[1] for line in found} == {*parsers} and (ROOT / "tools" / "published.py").exists()
