"""FVQ's recipe: the bridge against its formula, merged into the codebook, and the annealing of the learning rate."""

import math
from dataclasses import replace

import pytest
import torch
from support import ROOT
from support.models import TOKENIZER
from support.quantizer import draw_latents

import ibq
from ibq.api import same_codes_as
from ibq.config import UserError, config_to_dict, load_config, parse_config
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.quantizers import IBQConfig, SimVQConfig, VQBridgeConfig, VQConfig, build_quantizer
from ibq.scaling.tokenizer import quantizer_parameters
from ibq.training.checkpoint import weights_hash
from ibq.training.schedule import LinearScheduleConfig
from ibq.training.tokenizer_config import TokenizerRunConfig
from tools import convert

BRIDGE = VQBridgeConfig(group=4, width=12, blocks=2, heads=3, mlp_ratio=2, positions=False)
SMALL = {"num_codes": 16, "dim": 4}
KINDS = {
    "ibq": IBQConfig(**SMALL, projector=BRIDGE),
    "ibq, unit vectors": IBQConfig(**SMALL, l2_normalize=True, projector=BRIDGE),
    "vq": VQConfig(**SMALL, init="normal", projector=BRIDGE),
    "vq, unit vectors": VQConfig(**SMALL, init="normal", normalize="vectors", projector=BRIDGE),
    "simvq": SimVQConfig(**SMALL),
}


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, so that every part matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return module


def test_the_bridge_is_the_textbook_transformer_over_groups_of_codes():
    bridge = randomized(build_quantizer(KINDS["vq"]).projector).double()
    codebook, w = torch.randn(16, 4, dtype=torch.float64), dict(bridge.named_parameters())

    def linear(x, name):
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = linear(torch.stack([codebook[i : i + 4].flatten() for i in range(0, 16, 4)]), "compress")
    for block in ("blocks.0", "blocks.1"):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.qkv").split(12, dim=1)
        heads = []
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            attention = (q[:, part] @ k[:, part].t() / math.sqrt(4)).softmax(dim=1)
            heads.append(attention @ v[:, part])
        x = x + linear(torch.cat(heads, dim=1), f"{block}.out")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.0")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        assert hidden.shape[1] == 2 * 12
        x = x + linear(hidden, f"{block}.mlp.2")
    expected = codebook + linear(norm(x, "norm"), "recover").view(16, 4)
    torch.testing.assert_close(bridge(codebook), expected, rtol=1e-12, atol=1e-12)
    with_positions = build_quantizer(VQConfig(**SMALL, projector=replace(BRIDGE, positions=True))).projector
    assert {name for name, _ in with_positions.named_parameters()} - {*w} == {"position"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_quantizer_gives_the_same_bits_without_projector(kind):
    quantizer = randomized(build_quantizer(KINDS[kind])).eval()
    merged, z = quantizer.merged(), draw_latents()
    assert {*merged.state_dict()} == {"codebook"} and not any(p.requires_grad for p in merged.parameters())
    assert torch.equal(merged.code_vectors(), quantizer.code_vectors())
    assert not torch.equal(merged.codebook, quantizer.codebook)  # else nothing was to merge
    codes = quantizer.encode(z)
    assert torch.equal(merged.encode(z), codes) and torch.equal(merged.lookup(codes), quantizer.lookup(codes))
    assert torch.equal(merged(z).latents, quantizer(z).latents)
    with torch.device("meta"):
        built = build_quantizer(merged.config)
    assert {*built.state_dict()} == {"codebook"} and quantizer_parameters(merged.config) == 16 * 4


def tokenizer() -> Tokenizer:
    quantizer = {"kind": "vq", "num_codes": 32, "dim": 16, "init": "normal"}
    bridge = {"kind": "vqbridge", "group": 4, "width": 12, "heads": 3}
    tree = TOKENIZER | {"quantizer": quantizer | {"projector": bridge}}
    return randomized(Tokenizer(parse_config(TokenizerConfig, tree))).eval()


def test_a_merged_tokenizer_gives_the_same_codes_and_images(tmp_path, monkeypatch, capsys):
    """By the library, and through the file that the tool writes."""
    own = tokenizer()
    monkeypatch.setattr(convert, "find", lambda path: path)
    monkeypatch.setattr(convert, "load_tokenizer", lambda path, **_: own)
    convert.main(["export", str(tmp_path), str(tmp_path / "merged.safetensors"), "--merge-projector"])
    assert "32 codes without their projector" in capsys.readouterr().err
    assert same_codes_as(tmp_path / "merged.safetensors") == weights_hash(own.state_dict())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    codes = own.encode(images)
    assert len(codes.unique()) > 3
    for merged in (own.merged(), ibq.load_tokenizer(tmp_path / "merged.safetensors", device="cpu")):
        assert merged.config.quantizer.projector is None and config_to_dict(merged.config) is not None
        assert torch.equal(merged.encode(images), codes) and torch.equal(merged.decode(codes), own.decode(codes))
    with pytest.raises(ValueError, match="has none to merge into its codebook"):
        own.merged().merged()
    monkeypatch.setattr(convert, "load_tokenizer", lambda path, **_: own.merged())
    with pytest.raises(UserError, match=r"--merge-projector: quantizer\.projector: this tokenizer has none"):
        convert.main(["export", str(tmp_path), str(tmp_path / "again.safetensors"), "--merge-projector"])
    with pytest.raises(UserError, match=r"--merge-projector: writes a \.safetensors file"):
        convert.main(["export", str(tmp_path), str(tmp_path / "a.pt"), "--merge-projector", "--format", "llamagen"])


def test_learning_annealing_is_that_of_the_public_code():
    """Warm-up from 0.5%, the peak for 30% of what is left, then linearly to 1% at the last step."""
    steps_per_epoch, epochs, warmup = 10.0, 40, 4
    schedule = LinearScheduleConfig(warmup_epochs=warmup)
    for step in range(405):
        if step < 40:
            expected = 0.005 + 0.995 * step / 40
        else:
            passed = min(step - 40, 359) / 359
            expected = 1.0 if passed < 0.3 else 0.01 + 0.99 * (1 - passed) / 0.7
        assert schedule.learning_rate(2.0, step, steps_per_epoch, 10 * epochs) == pytest.approx(2 * expected)


@pytest.mark.parametrize("name", ["warmup_epochs", "warmup_start", "plateau", "end"])
def test_a_schedule_that_cannot_be(name):
    with pytest.raises(ValueError, match=f"^{name}: must "):
        LinearScheduleConfig(**{name: -0.1})
    with pytest.raises(ValueError, match=f"^{name}: must "):
        LinearScheduleConfig(**{name: math.inf if name == "warmup_epochs" else 1.5})


# Codes, and numbers of the bridge: two layers of group x 256 x 256, and two blocks of 8 x 256 x 256, with biases.
@pytest.mark.parametrize(("codes", "group", "file"), [(16_384, 16, "fvq_16384"), (262_144, 64, "fvq_262144")])
def test_fvq_files(codes, group, file):
    config = load_config(TokenizerRunConfig, ROOT / "yaml" / f"{file}.yaml")
    with torch.device("meta"):
        quantizer = build_quantizer(config.model.quantizer)
    blocks = 2 * (4 * 256 * 256 + 4 * 256 + 2 * 2 * 256 * 256 + 3 * 256 + 4 * 256)
    around = 2 * group * 256 * 256 + 256 + group * 256 + 2 * 256
    found = {name.split(".")[0]: 0 for name, _ in quantizer.named_parameters()}
    for name, parameter in quantizer.named_parameters():
        found[name.split(".")[0]] += parameter.numel()
    assert found == {"codebook": codes * 256, "projector": blocks + around}
    assert config.training.total_steps(1_281_167 / 128) == 400_365  # its last checkpoint is that of step 400,000
    assert config.schedule.learning_rate(1e-4, 0, 10_009, 400_365) == pytest.approx(5e-7)
    ibq_file = load_config(TokenizerRunConfig, ROOT / "yaml/tokenizer_262144_vqbridge.yaml")
    plain = load_config(TokenizerRunConfig, ROOT / "yaml/tokenizer_262144.yaml")
    bridge = load_config(TokenizerRunConfig, ROOT / "yaml/fvq_262144.yaml").model.quantizer.projector
    quantizer = replace(plain.model.quantizer, projector=bridge)
    assert replace(plain, output=ibq_file.output, model=replace(plain.model, quantizer=quantizer)) == ibq_file


def test_post_training_file():
    """The tokenizer and the transformer are those of the files that it names; nothing else of the model differs."""
    post, plain = (
        load_config(TokenizerRunConfig, ROOT / "yaml" / f"{name}.yaml")
        for name in ("tokenizer_16384_post", "tokenizer_16384")
    )
    assert post.model == plain.model and post.loss == plain.loss and post.start.place == plain.output
    assert post.training.total_steps(1_281_167 / 1024) == pytest.approx(100 * 200_000 / 1024, rel=0.03)
    rates = [post.schedule.learning_rate(5e-5, step, 1, 20_019) for step in (0, 195, 20_019)]
    assert rates == pytest.approx([0, 5e-5, 1e-5])
