"""Published checkpoints: taken over, used, and written back in the form of the code that published them."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.golden import golden_dir, golden_json
from support.published import (
    State,
    blurring_discriminator_state,
    discriminator_of,
    lightning_state,
    llamagen_reconstruction,
    llamagen_state,
    open_magvit2_reconstruction,
    open_magvit2_state,
    patch_discriminator_state,
    read_discriminator,
    read_tokenizer,
    read_transformer,
)

import ibq
import yaml
from ibq.config import UserError
from ibq.data.index import sha256_of
from ibq.interop import llamagen, open_magvit2, seed_voken
from ibq.interop.families import family_of, read_published
from ibq.interop.reference_tensors import read_file
from ibq.models.discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer
from ibq.quantizers import IBQConfig, LFQConfig, VQConfig
from tools import convert

AR_CASES = ("ar_small", "ar_small_kv2", "ar_small_shared_aln")


def golden_checkpoint(name: str) -> Path:
    return golden_dir() / golden_json(name)["checkpoint"]["file"]


def state_of(path: Path) -> State:
    return torch.load(path, weights_only=True)["state_dict"]


def run(*arguments) -> None:
    convert.main([str(argument) for argument in arguments])


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# --- IBQ tokenizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_import_gives_the_chosen_weights_and_says_where_they_are_from(tmp_path, weights):
    checkpoint, out = golden_checkpoint("tokenizer_small"), tmp_path / "t.safetensors"
    run("import", "seed-voken", checkpoint, out, "--weights", weights)
    assert_same(load_file(out), read_tokenizer(checkpoint, weights))
    facts = metadata_of(out)
    assert facts["source"] == checkpoint.name and facts["source_sha256"] == sha256_of(checkpoint)
    assert (facts["weights"], facts["family"], facts["step"], facts["epoch"]) == (weights, "seed-voken", "1234", "4")
    imported, direct = (
        ibq.load_tokenizer(place, device="cpu")
        if place == out
        else ibq.load_tokenizer(place, device="cpu", weights=weights)
        for place in (out, checkpoint)
    )
    assert imported.config == direct.config
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(imported.encode(images), direct.encode(images))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_tokenizer_with_its_rest_goes_back_to_the_same_checkpoint(tmp_path, weights):
    checkpoint = golden_checkpoint("tokenizer_small")
    out, rest, back = tmp_path / "t.safetensors", tmp_path / "rest.safetensors", tmp_path / "back.ckpt"
    run("import", "seed-voken", checkpoint, out, "--weights", weights, "--rest", rest)
    run("export", out, back, "--format", "seed-voken", "--rest", rest)
    assert_same(state_of(back), state_of(checkpoint))
    again = torch.load(back, weights_only=True)
    assert (again["global_step"], again["epoch"]) == (1234, 4)


def test_a_tokenizer_alone_has_its_weights_in_both_places(tmp_path):
    out, back = tmp_path / "t.safetensors", tmp_path / "back.ckpt"
    run("import", "seed-voken", golden_checkpoint("tokenizer_small"), out)
    run("export", out, back, "--format", "seed-voken")
    for weights in ("raw", "ema"):
        assert_same(read_tokenizer(back, weights), load_file(out))
    with pytest.raises(ValueError, match="no discriminator"):
        read_discriminator(back)


def test_config_file_of_the_reference(tmp_path):
    config = tmp_path / "reference.yaml"
    arguments = golden_json("tokenizer_small")["config"]
    config.write_text(yaml.safe_dump({"model": {"class_path": "IBQ", "init_args": arguments}}))
    out = tmp_path / "t.safetensors"
    run("import", "seed-voken", golden_checkpoint("tokenizer_small"), out, "--config", config)
    expected = seed_voken.tokenizer_config_from_reference(arguments)
    assert ibq.load_tokenizer(out, device="cpu").config == expected and expected.resolution == 32
    run("import", "seed-voken", golden_checkpoint("tokenizer_small"), out, "--resolution", 64)
    assert ibq.load_tokenizer(out, device="cpu").config.attention_resolutions == (16,)


# --- AR models ------------------------------------------------------------------------------------


def reference_yaml(folder: Path, case: str) -> Path:
    stages = {
        "transformer_config": {"target": "GPT", "params": golden_json(case)["params"]},
        "first_stage_config": {"target": "IBQ", "params": golden_json("tokenizer_small")["config"]},
    }
    path = folder / "ar.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"learning_rate": 3e-4, **stages}}}))
    return path


@pytest.mark.parametrize("case", AR_CASES)
def test_an_ar_checkpoint_goes_back_to_the_same_checkpoint(tmp_path, case):
    checkpoint, out, back = golden_checkpoint(case), tmp_path / "ar.safetensors", tmp_path / "back.ckpt"
    run("import", "seed-voken", checkpoint, out, "--config", reference_yaml(tmp_path, case))
    tokenizer = tmp_path / "ar.tokenizer.safetensors"
    assert tokenizer.exists() == any(name.startswith("first_stage_model.") for name in state_of(checkpoint))
    beside = ["--tokenizer", tokenizer] if tokenizer.exists() else []
    run("export", out, back, "--format", "seed-voken", *beside)
    assert_same(state_of(back), state_of(checkpoint))
    loaded = ibq.load_transformer(out, device="cpu")
    assert loaded.config == seed_voken.transformer_config_from_reference(golden_json(case)["params"])
    if beside:
        assert_same(load_file(tokenizer), read_tokenizer(golden_checkpoint("tokenizer_small"), "ema"))
        assert metadata_of(tokenizer)["source"] == checkpoint.name


def test_a_config_of_other_heads_is_refused_where_shapes_show_it(tmp_path):
    params = golden_json("ar_small")["params"] | {"n_layer": 2}
    path = tmp_path / "ar.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": params}}))
    with pytest.raises(UserError, match=r"unexpected tensors: transformer\.blocks\.2\."):
        run("import", "seed-voken", golden_checkpoint("ar_small_kv2"), tmp_path / "x.safetensors", "--config", path)


# --- The full sizes, on the meta device -----------------------------------------------------------


def official(part: str) -> dict:
    return golden_json("official_shapes")[part]


def official_tokenizer(num_codes: str) -> dict[str, tuple[int, ...]]:
    """Every name and shape that the reference's model has, but for LPIPS, which is not this project's."""
    listing = official("tokenizer")
    plain = {f"{p}.{leaf}": tuple(s) for p, leaves in listing["plain"].items() for leaf, s in leaves.items()}
    plain = {name: shape for name, shape in plain.items() if not name.startswith("loss.perceptual_loss.")}
    buffers = listing["model_ema"]["plain_entries_without_ema"]["buffers"]
    averages = {"model_ema." + n.replace(".", ""): s for n, s in plain.items() if n not in buffers}
    changed = {name: tuple(shape) for name, shape in listing["differences_to_16384"].get(num_codes, {}).items()}
    return plain | averages | {"model_ema.decay": (), "model_ema.num_updates": ()} | changed


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("num_codes", official("tokenizer")["parameter_counts"])
def test_full_size_tokenizers_are_written_with_the_official_names(num_codes, monkeypatch):
    config = TokenizerConfig(quantizer=IBQConfig(num_codes=int(num_codes)))
    with torch.device("meta"):
        state = Tokenizer(config).state_dict()
        discriminator = PatchDiscriminator(PatchDiscriminatorConfig()).state_dict()
    written = seed_voken.write_tokenizer(config, state, state, discriminator)
    assert shapes(written) == official_tokenizer(num_codes)
    monkeypatch.setattr(seed_voken, "read_state", lambda path: written)
    for weights in ("ema", "raw"):
        (found,) = seed_voken.read("x.ckpt", weights)
        assert found.config == config and shapes(found.tensors) == shapes(state)


@pytest.mark.parametrize("size", official("ar")["models"])
def test_full_size_transformers_are_written_with_the_official_names(size, monkeypatch):
    model = official("ar")["models"][size]
    config = seed_voken.transformer_config_from_reference(model["config"])
    tokenizer = TokenizerConfig(quantizer=IBQConfig(num_codes=16384))
    with torch.device("meta"):
        state, first_stage = Transformer(config).state_dict(), Tokenizer(tokenizer).state_dict()
    written = seed_voken.write_transformer(config, state, (tokenizer, first_stage))
    expected = {
        pattern.replace("{i}", str(i)): tuple(shape)
        for pattern, shape in model["transformer_pattern"].items()
        for i in (range(model["n_layer"]) if "{i}" in pattern else [None])
    }
    plain = {n: s for n, s in official_tokenizer("16384").items() if not n.startswith(("loss.", "model_ema."))}
    expected |= {f"first_stage_model.{name}": shape for name, shape in plain.items()}
    assert shapes(written) == expected and len(written) == model["entries"]["total"]
    monkeypatch.setattr(seed_voken, "read_state", lambda path: written)
    found = {model.kind: model for model in seed_voken.read("x.ckpt")}
    assert found[Transformer].config.depth == config.depth and found[Transformer].config.num_heads == config.num_heads
    assert shapes(found[Transformer].tensors) == shapes(state) and found[Tokenizer].config == tokenizer


# --- Open-MAGVIT2 ---------------------------------------------------------------------------------

SMALL_MAGVIT = {"multipliers": (1, 1, 2), "bits": 6, "blocks": 2, "channels": 32}


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_open_magvit2_computes_what_its_tensors_say(tmp_path, weights):
    network = open_magvit2_state(**SMALL_MAGVIT)
    state = lightning_state(network, patch_discriminator_state(8, 2))
    checkpoint, out = tmp_path / "m.ckpt", tmp_path / "m.safetensors"
    torch.save({"state_dict": state}, checkpoint)
    run("import", "open-magvit2", checkpoint, out, "--weights", weights, "--rest", tmp_path / "rest.safetensors")
    tokenizer = ibq.load_tokenizer(out, device="cpu")
    assert tokenizer.config.quantizer == LFQConfig(dim=6) and tokenizer.config.network == "open_magvit2"
    images = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    used = {n: v * 0.9 for n, v in network.items()} if weights == "ema" else network
    codes, reconstruction = open_magvit2_reconstruction(used, images)
    assert torch.equal(tokenizer.encode(images), codes) and len(codes.unique()) > 3
    assert torch.allclose(tokenizer.decode(codes), reconstruction, atol=1e-4 * float(reconstruction.abs().max()))
    direct = ibq.load_tokenizer(checkpoint, weights=weights, device="cpu")
    assert torch.equal(direct.encode(images), codes)
    run("export", out, tmp_path / "b.ckpt", "--format", "open-magvit2", "--rest", tmp_path / "rest.safetensors")
    assert_same(state_of(tmp_path / "b.ckpt"), state)
    run("export", out, tmp_path / "c.ckpt", "--format", "open-magvit2")
    assert_same(
        {n: v for n, v in open_magvit2.read(tmp_path / "c.ckpt", "raw")[0].tensors.items() if "." in n},
        load_file(out),
    )


@pytest.mark.parametrize("multipliers, bits, resolution", [((1, 1, 2, 2, 4), 18, 256), ((1, 2, 2, 4), 18, 128)])
def test_open_magvit2_full_sizes(monkeypatch, multipliers, bits, resolution):
    state = open_magvit2_state(multipliers, bits, blocks=4, channels=128)
    meta = {name: torch.empty(value.shape, device="meta") for name, value in state.items()}
    monkeypatch.setattr(open_magvit2, "read_state", lambda path: meta)
    (found,) = open_magvit2.read("x.ckpt", "raw")
    assert (found.config.resolution, found.config.quantizer.num_codes) == (resolution, 2**bits)
    assert found.config.channel_multipliers == multipliers and found.config.res_blocks == 4
    assert found.config.tokens_per_side == 16


def test_text_to_image_tokenizers_have_another_discriminator():
    state = lightning_state(open_magvit2_state(**SMALL_MAGVIT), blurring_discriminator_state())
    parts = open_magvit2.IMPLEMENTATION.split(state, "x")
    assert "block_in.0.weight" in parts.discriminator
    for name in ("loss.discriminator.blocks.1.2.bias", "loss.discriminator.to_logits.2.weight"):
        with pytest.raises(ValueError, match=f"missing tensors: {name}"):
            open_magvit2.IMPLEMENTATION.split({n: v for n, v in state.items() if n != name}, "x")
    ibq_state = seed_voken.write_tokenizer(
        TokenizerConfig(),
        *(meta_tokenizer(TokenizerConfig()) for _ in range(2)),
        blurring_discriminator_state(),
    )
    ibq_parts = seed_voken.IMPLEMENTATION.split(ibq_state, "x")
    assert discriminator_of(ibq_parts, "ema", "x").keys() == parts.discriminator.keys()


def meta_tokenizer(config: TokenizerConfig) -> State:
    with torch.device("meta"):
        return Tokenizer(config).state_dict()


# --- LlamaGen -------------------------------------------------------------------------------------


def test_llamagen_computes_what_its_tensors_say(tmp_path):
    state = llamagen_state((1, 2, 1))
    checkpoint, out, back = tmp_path / "vq.pt", tmp_path / "vq.safetensors", tmp_path / "back.pt"
    torch.save({"model": state}, checkpoint)
    run("import", "llamagen", checkpoint, out, "--resolution", 32)
    tokenizer = ibq.load_tokenizer(out, device="cpu")
    assert tokenizer.config.attention_resolutions == (8,) and metadata_of(out)["weights"] == "raw"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, reconstruction = llamagen_reconstruction(state, images)
    assert torch.equal(tokenizer.encode(images), codes) and len(codes.unique()) > 3
    assert torch.allclose(tokenizer.decode(codes), reconstruction, atol=1e-4 * float(reconstruction.abs().max()))
    assert torch.equal(ibq.load_tokenizer(checkpoint, device="cpu").encode(images), codes)
    run("export", out, back, "--format", "llamagen")
    assert_same(torch.load(back, weights_only=True)["model"], state)


@pytest.mark.parametrize("multipliers, tokens", [((1, 1, 2, 2, 4), 16), ((1, 2, 2, 4), 32)])
def test_llamagen_full_sizes(multipliers, tokens):
    """VQ-16 and VQ-8: its repository counts 72 and 70 million parameters."""
    state = llamagen_state(multipliers, codes=16_384)
    assert round(sum(v.numel() for n, v in state.items() if n != llamagen.CODES_SEEN) / 1e6) == (
        72 if tokens == 16 else 70
    )
    config = TokenizerConfig(
        channel_multipliers=multipliers,
        res_blocks=2,
        attention_resolutions=(256 // 2 ** (len(multipliers) - 1),),
        quantizer=VQConfig(num_codes=16_384, dim=8, normalize="vectors", beta_weighs="commitment"),
    )
    assert config.tokens_per_side == tokens
    assert shapes(llamagen.write_tokenizer(config, meta_tokenizer(config))) == shapes(state)
    for name in meta_tokenizer(config):
        assert llamagen.our_name(llamagen.reference_name(name, len(multipliers)), len(multipliers)) == name


def test_llamagen_averages_and_missing_tensors(tmp_path):
    state = llamagen_state((1, 1))
    averaged = {name: value * 0.5 for name, value in state.items()}
    torch.save({"model": state, "ema": averaged, "steps": 3}, tmp_path / "vq.pt")
    for weights, expected in (("ema", averaged), ("raw", state)):
        (found,) = llamagen.read(tmp_path / "vq.pt", weights)
        assert found.weights == weights
        assert torch.equal(found.tensors["quantizer.codebook"], expected["quantize.embedding.weight"])
    for name in ("decoder.conv_blocks.0.attn.2.proj_out.bias", "encoder.mid.1.q.weight", "quantize.embedding.weight"):
        torch.save({"model": {n: v for n, v in state.items() if n != name}}, tmp_path / "less.pt")
        with pytest.raises(ValueError, match=f"missing tensors: {name}"):
            llamagen.read(tmp_path / "less.pt")
    torch.save({"model": state | {"encoder.surplus.weight": torch.zeros(1)}}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"unexpected tensors: encoder\.surplus\.weight"):
        llamagen.read(tmp_path / "more.pt")
    torch.save({"model": {"layers.0.attention.wqkv.weight": torch.zeros(1)}}, tmp_path / "gpt.pt")
    with pytest.raises(ValueError, match="no adaptive norms"):
        llamagen.read(tmp_path / "gpt.pt")


# --- From runs ------------------------------------------------------------------------------------


def test_a_run_is_exported_with_both_sets_and_its_discriminator(tmp_path):
    from support.training import checkpoint_tensors, make_workplace, train_here

    place = make_workplace(tmp_path / "place")
    for stage in ("tokenizer", "transformer"):
        assert train_here(stage, ["--config", str(place / f"{stage}.yaml"), f"output={place / stage}"]) == 0
    out = tmp_path / "t.ckpt"
    run("export", place / "tokenizer", out, "--format", "seed-voken")
    expected = checkpoint_tensors(place / "tokenizer", 4)
    for weights, part in (("ema", "ema"), ("raw", "weight")):
        for name, value in read_tokenizer(out, weights).items():
            assert torch.equal(value, expected[f"tokenizer/{part}/{name}"]), name
    discriminator = read_discriminator(out)
    for name, value in discriminator.items():
        if f"discriminator/weight/{name}" in expected:
            assert torch.equal(value, expected[f"discriminator/weight/{name}"]), name
    assert torch.load(out, weights_only=True)["global_step"] == 4
    run(
        "export",
        place / "transformer",
        tmp_path / "a.ckpt",
        "--format",
        "seed-voken",
        "--tokenizer",
        place / "tokenizer",
    )
    transformer = ibq.load_transformer(place / "transformer" / "checkpoints" / "step-00000004", device="cpu")
    assert_same(read_transformer(tmp_path / "a.ckpt"), dict(transformer.state_dict()))
    assert_same(read_tokenizer(tmp_path / "a.ckpt"), read_tokenizer(out, "ema"))
    for arguments, said in (
        ((place / "tokenizer", "--format", "llamagen"), "does not fit LlamaGen"),
        ((place / "tokenizer", "--format", "open-magvit2"), "network: 'vqgan' does not fit Open-MAGVIT2"),
        ((place / "transformer", "--format", "llamagen"), "does not fit LlamaGen"),
        ((place / "tokenizer", "--format", "seed-voken", "--tokenizer", place / "tokenizer"), "--tokenizer"),
    ):
        with pytest.raises(UserError, match=said):
            run("export", arguments[0], tmp_path / "x.ckpt", *arguments[1:])
    with pytest.raises(UserError, match="ends with"):
        run("export", place / "tokenizer", tmp_path / "x.safetensors", "--format", "seed-voken")


# --- Files that are no checkpoints ----------------------------------------------------------------


class Surprise:
    """Pickled, it would run a command."""

    def __reduce__(self):
        return (print, ("ran",))


def damage(path: Path) -> Path:
    """A copy in which one byte of the largest record is another."""
    copy = path.with_name(f"flipped{path.suffix}")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[record.header_offset + 200 + record.file_size // 2] ^= 1
    copy.write_bytes(data)
    return copy


def bad_files(folder: Path):
    """(file, family, words of the error)"""
    golden = golden_checkpoint("tokenizer_small")
    whole = folder / "whole.ckpt"
    whole.write_bytes(golden.read_bytes())
    cut = folder / "cut.ckpt"
    cut.write_bytes(golden.read_bytes()[:-1000])
    empty = folder / "empty.ckpt"
    empty.write_bytes(b"")
    text = folder / "text.ckpt"
    text.write_text("<html>404</html>")
    torch.save({"state_dict": {}, "callbacks": Surprise()}, folder / "unsafe.ckpt")
    (folder / "plain.pt").write_bytes(pickle.dumps({"model": Surprise()}, protocol=2))
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}}, folder / "less.ckpt")
    torch.save({"epoch": 3}, folder / "no_tensors.ckpt")
    torch.save([torch.zeros(1)], folder / "list.ckpt")
    yield folder / "absent.ckpt", "seed-voken", "no such file"
    for name in ("cut", "empty", "text"):
        yield folder / f"{name}.ckpt", "seed-voken", "download it again"
    yield damage(whole), "seed-voken", "another checksum"
    for name in ("unsafe.ckpt", "plain.pt"):
        yield folder / name, "seed-voken", "may run code; ask for a file of tensors"
    yield folder / "less.ckpt", "seed-voken", "wrong shapes: encoder.conv_in.weight [1]"
    for name in ("no_tensors", "list"):
        yield folder / f"{name}.ckpt", "seed-voken", "no table of tensors"
    yield whole, "llamagen", "import it as seed-voken"


def test_bad_files_are_named_with_a_remedy(tmp_path, capfd):
    for path, family, said in bad_files(tmp_path):
        with pytest.raises(UserError) as error:
            run("import", family, path, tmp_path / "x.safetensors")
        message = str(error.value)
        assert said in message and str(path) in message and "\n" not in message, message
    assert "ran" not in capfd.readouterr().out
    assert not list(tmp_path.glob("*.safetensors"))


def test_exit_code_of_a_bad_file(tmp_path):
    from support.processes import run_script

    torch.save({"state_dict": {}, "callbacks": Surprise()}, tmp_path / "unsafe.ckpt")
    done = run_script(
        "tools/convert.py", "import", "seed-voken", str(tmp_path / "unsafe.ckpt"), str(tmp_path / "x.safetensors")
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "unsafe.ckpt" in done.stderr, done.stderr


def test_other_mistakes_of_the_command_line(tmp_path):
    golden, out = golden_checkpoint("tokenizer_small"), tmp_path / "t.safetensors"
    (tmp_path / "bad.yaml").write_text("model: 3")
    for arguments, said in (
        (("import", "seed-voken", golden, tmp_path / "t.bin"), "ends with .safetensors"),
        (("import", "seed-voken", golden, out, "--resolution", 0), "--resolution"),
        (("import", "seed-voken", golden, out, "--config", tmp_path / "bad.yaml"), "model.init_args"),
        (("import", "seed-voken", golden, out, "--config", tmp_path / "absent.yaml"), "not a readable YAML"),
        (("import", "seed-voken", golden_checkpoint("ar_small_kv2"), out), "heads of 64 channels"),
        (("export", golden, out, "--rest", out), "--format"),
    ):
        with pytest.raises(UserError, match=said):
            run(*arguments)
    run("import", "seed-voken", golden, out)
    with pytest.raises(UserError, match="missing tensors"):
        run("export", out, tmp_path / "x.ckpt", "--format", "seed-voken", "--rest", out)


def test_files_without_checksums_are_not_called_damaged(tmp_path):
    golden = golden_checkpoint("tokenizer_small")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.load(golden, weights_only=True), tmp_path / "x.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    run("import", "seed-voken", tmp_path / "x.ckpt", tmp_path / "x.safetensors")


def test_reading_leaves_tensors_on_the_disk(tmp_path):
    """A file may be larger than the memory that is left."""

    def anonymous() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    torch.save({"state_dict": {"x": torch.ones(2**25)}}, tmp_path / "x.ckpt")
    before = anonymous()
    table = read_file(tmp_path / "x.ckpt")
    assert float(table["state_dict"]["x"].sum()) == 2**25
    assert anonymous() - before < 2**25
    torch.save({"state_dict": {"x": torch.ones(3)}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_file(tmp_path / "old.ckpt")["state_dict"]["x"], torch.ones(3))


def test_families_are_recognised():
    assert family_of(llamagen_state((1, 1))) == "llamagen"
    assert family_of(open_magvit2_state(**SMALL_MAGVIT)) == "open-magvit2"
    assert family_of(state_of(golden_checkpoint("tokenizer_small"))) == "seed-voken"
    with pytest.raises(ValueError, match="has no transformer"):
        read_published(golden_checkpoint("tokenizer_small"), hints=seed_voken.Hints(kind=Transformer))


def test_described_models_can_be_built_again():
    (found,) = read_published(golden_checkpoint("tokenizer_small"))
    described = json.loads(json.dumps(found.describe()))
    assert described["kind"] == "Tokenizer" and described["config"]["quantizer"]["num_codes"] == 128
