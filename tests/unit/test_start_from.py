"""Starting from weights: what is taken, made and refused, on modules in this process."""

from dataclasses import replace

import pytest
import torch
from support.golden import golden_dir
from support.models import TOKENIZER, TRANSFORMER, small_transformer
from support.published import lightning_state, patch_discriminator_state
from support.training import CODES, write_best

from ibq.config import ConfigError, UserError, parse_config
from ibq.engine.base import EngineSettings, OptimizerConfig
from ibq.engine.blueprint import Blueprint
from ibq.engine.local import LocalEngine
from ibq.interop import seed_voken
from ibq.models.discriminator import PatchDiscriminator
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer
from ibq.ops.codebook import directions, resized_codebook
from ibq.tensor_file import write_tensors
from ibq.training.ar_config import ARRunConfig
from ibq.training.start_from.config import TokenizerStartConfig, TransformerStartConfig
from ibq.training.start_from.fit import fit_tokenizer, fit_transformer
from ibq.training.start_from.places import local_place, open_place
from ibq.training.start_from.run import load, table
from ibq.training.tokenizer_config import TokenizerRunConfig

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
QUANTIZER = TOKENIZER["quantizer"]
CPU = torch.device("cpu")
GAN = {"discriminator": {"channels": 8, "layers": 2}}


def tokenizer_run(start_from=None, gan=GAN, **model) -> TokenizerRunConfig:
    given = {"data": {"train": "a", "validation": "b"}, "training": {"max_steps": 1}, "loss": {"gan": gan}}
    return parse_config(TokenizerRunConfig, given | {"model": TOKENIZER | model, "start_from": start_from})


def transformer_run(start_from=None, **model) -> ARRunConfig:
    given = {"data": {"kind": "codes", "train": "a", "validation": "b"}, "training": {"max_steps": 1}}
    return parse_config(ARRunConfig, given | {"model": TRANSFORMER | model, "start_from": start_from})


def quantizer(**changed):
    return {"quantizer": QUANTIZER | changed}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(3)
    return Tokenizer(tokenizer_run().model).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer):
    """Own weights of both stages, and files of the published form; Adam's first moments are the parameters' numbers."""
    folder = tmp_path_factory.mktemp("places")
    write_best(folder / "tokenizer", tokenizer)
    torch.manual_seed(4)
    write_best(folder / "transformer", small_transformer(**TRANSFORMER))
    network, judge = seed_voken._reference_names(tokenizer.state_dict()), patch_discriminator_state(8, 2)
    state = lightning_state(network, judge)
    sizes = (len([*tokenizer.parameters()]), len([*judge]) - 6)
    shapes = ([p.shape for p in tokenizer.parameters()], [t.shape for n, t in judge.items() if ".running" not in n])
    shapes[1][:] = [shape for shape in shapes[1] if len(shape)]  # the numbers of batches are no parameters
    assert tuple(map(len, shapes)) == sizes
    adam = [
        {
            "state": {
                n: {"step": 5.0, "exp_avg": torch.full(s, n), "exp_avg_sq": torch.full(s, 0.5)}
                for n, s in enumerate(of)
            }
        }
        for of in shapes
    ]
    torch.save({"state_dict": state}, folder / "t.ckpt")
    torch.save({"state_dict": state, "optimizer_states": adam}, folder / "adam.ckpt")
    return folder


def fit(folder, run, **options):
    if isinstance(run, ARRunConfig):
        start = TransformerStartConfig(place=str(folder), **options)
        return fit_transformer(open_place(Transformer, start), run, start, None)
    start = TokenizerStartConfig(place=str(folder), **options)
    return fit_tokenizer(open_place(Tokenizer, start), run, start)


def engine_of(build, name: str = "x") -> LocalEngine:
    settings = EngineSettings(optimizer=OptimizerConfig(), device=CPU, ema_decay=0.9)
    return LocalEngine(Blueprint(name=name, build=build, seed=0), settings)


def started(found, run):
    """The module of a run that has begun so, in eval mode, and its engine."""
    name, kind = ("transformer", Transformer) if isinstance(run, ARRunConfig) else ("tokenizer", Tokenizer)
    engine = engine_of(lambda: kind(run.model))
    load(engine, found.engines[name], CPU)
    return engine.module.eval(), engine


def became(found) -> dict[str, str]:
    return {row.part: row.became for row in found.rows}


# --- What is taken ---


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_all_weights_and_their_average_are_those_of_the_place(places, stage):
    run = tokenizer_run() if stage == "tokenizer" else transformer_run()
    module, engine = started(fit(places / stage, run), run)
    expected = open_place(type(module), run_start(places / stage, stage)).tensors
    for name, state in engine.named_state():
        assert torch.equal(state.weight, expected[name]) and torch.equal(state.ema, expected[name]), name
    assert engine.steps == 0 and engine.state_parts() == ("weight", "ema")


def run_start(folder, stage):
    kind = TokenizerStartConfig if stage == "tokenizer" else TransformerStartConfig
    return kind(place=str(folder))


def test_a_published_file_gives_discriminator_and_optimizers(places):
    run = tokenizer_run()
    found = fit(places / "adam.ckpt", run, resolution="other", weights="raw")
    _, engine = started(found, run)
    assert engine.steps == 5
    moments = [float(state.moment1.flatten()[0]) for _, state in engine.named_state()]
    assert moments == [*range(len(moments))]  # in the order of the program that has written them
    judge = engine_of(lambda: PatchDiscriminator(run.loss.gan.discriminator), "discriminator")
    load(judge, found.engines["discriminator"], CPU)
    expected = patch_discriminator_state(8, 2)
    state = judge.module.state_dict() | {n.removeprefix("discriminator/"): t for n, t in found.rank_tensors.items()}
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith("running_var"):  # drawn anew
            assert torch.equal(state[name], tensor), name
    assert became(found)["discriminator"] == "taken" and became(found)["LeCAM's averages"] == "new"


def test_what_is_not_wanted_is_left(places):
    found = fit(places / "adam.ckpt", tokenizer_run(), resolution="other", also=())
    assert found.engines.keys() == {"tokenizer"} and found.engines["tokenizer"].moments is None
    rows = became(found)
    assert rows["discriminator"] == rows["raw weights"] == "left" and rows["optimizers"] == "new"
    without = fit(places / "adam.ckpt", tokenizer_run(gan={"enabled": False}), resolution="other")
    assert without.engines.keys() == {"tokenizer"} and "loss.gan.enabled is false" in table(without.rows)


def test_the_golden_checkpoints_fit_their_configs():
    small = {"resolution": 32, "channels": 32, "channel_multipliers": [1, 1, 2], "attention_resolutions": [8]}
    run = tokenizer_run(gan={"discriminator": {"channels": 16, "layers": 2}}, **small, **quantizer(num_codes=128))
    found = fit(golden_dir() / "tokenizer_small.ckpt", run, resolution="other")
    assert became(found)["LPIPS"] == "left" and became(found)["discriminator"] == "taken"


# --- What is made ---


def test_more_dimensions_change_neither_codes_nor_images(places, tokenizer):
    run = tokenizer_run(**quantizer(dim=24))
    module, _ = started(fit(places / "tokenizer", run, codebook="rows"), run)
    codes = tokenizer.encode(IMAGES)
    assert torch.equal(module.encode(IMAGES), codes) and len(codes.unique()) > 1
    assert torch.allclose(module.decode(codes), tokenizer.decode(codes), atol=1e-5)
    assert module.quant_conv.weight[16:].abs().min() > 0, "the new channels are not drawn"


def test_fewer_dimensions_keep_what_codes_in_fewer_say(tmp_path, tokenizer):
    flat = Tokenizer(tokenizer.config).eval()
    flat.load_state_dict(tokenizer.state_dict())
    with torch.no_grad():  # codes that use 5 of 16 dimensions, turned
        turn = torch.linalg.qr(torch.randn(16, 16)).Q
        flat.quantizer.codebook.copy_(torch.randn(CODES, 5) @ turn[:5])
    write_best(tmp_path / "flat", flat)
    run = tokenizer_run(**quantizer(dim=5))
    module, _ = started(fit(tmp_path / "flat", run, codebook="rows"), run)
    codes = flat.encode(IMAGES)
    assert torch.equal(module.encode(IMAGES), codes) and len(codes.unique()) > 1
    assert torch.allclose(module.decode(codes), flat.decode(codes), atol=1e-4)


def test_codebooks_of_another_size():
    codes = torch.randn(40, 6)
    assert torch.equal(resized_codebook(codes, 12, "rows", spherical=False), codes[:12])
    more = resized_codebook(codes, 100, "rows", spherical=False)
    assert torch.equal(more[:40], codes) and len(more.unique(dim=0)) == 100
    assert torch.allclose(more[40:80], codes, atol=0.1) and not torch.equal(more[40:80], codes)
    centres = resized_codebook(
        torch.cat([codes[:3] + 0.001 * torch.randn(3, 6) for _ in range(10)]), 3, "kmeans", spherical=False
    )
    assert torch.cdist(codes[:3], centres).min(dim=1).values.max() < 5.0 and centres.shape == (3, 6)
    basis = directions(codes, 4)
    assert torch.allclose(basis.t() @ basis, torch.eye(4), atol=1e-5)


def test_a_new_codebook_leaves_the_networks(places, tokenizer):
    run = tokenizer_run(**quantizer(num_codes=64))
    found = fit(places / "tokenizer", run, codebook="new")
    module, _ = started(found, run)
    fresh = engine_of(lambda: Tokenizer(run.model)).module
    assert torch.equal(module.quantizer.codebook, fresh.quantizer.codebook)
    assert torch.equal(module.quant_conv.weight, tokenizer.quant_conv.weight)
    lattice = tokenizer_run(quantizer={"kind": "fsq", "levels": [8, 4]})
    rows = became(fit(places / "tokenizer", lattice, codebook="new"))
    assert rows["quant_conv"] == "new" and rows["encoder"] == "taken"


def test_new_classes_keep_that_of_no_class(places):
    run = transformer_run(num_classes=7)
    found = fit(places / "transformer", run, classes="new")
    module, _ = started(found, run)
    fresh = engine_of(lambda: Transformer(run.model)).module
    old = small_transformer(**TRANSFORMER)
    assert torch.equal(module.class_emb.weight[:-1], fresh.class_emb.weight[:-1])
    assert torch.equal(
        module.class_emb.weight[-1],
        open_place(Transformer, run_start(places / "transformer", "")).tensors["class_emb.weight"][-1],
    )
    assert torch.equal(module.head.weight, old.head.weight) and became(found)["class_emb"] == "made"


def test_rotary_tables_follow_the_resolution(places):
    run = transformer_run(tokens_per_side=6)
    found = fit(places / "transformer", run, resolution="other")
    module, _ = started(found, run)
    assert module(torch.zeros(1, 36, dtype=torch.long), torch.tensor([0])).shape == (1, 36)
    assert "4 x 4 tokens become 6 x 6" in table(found.rows)
    run = transformer_run(grids=[[4, 4], [2, 6]])
    found = fit(places / "transformer", run, resolution="other")
    module, _ = started(found, run)
    assert module(torch.zeros(1, 2, 6, dtype=torch.long), torch.tensor([0])).shape == (1, 12)
    assert "4 x 4 tokens become 4 x 4 and 2 x 6" in table(found.rows)


def test_embeddings_of_positions_stay_with_their_rows_and_columns(tmp_path):
    old = small_transformer(**TRANSFORMER, order="random")
    write_best(tmp_path / "run/best", old)
    run = transformer_run(grids=[[3, 5], [2, 6]], order="random")
    module, _ = started(fit(tmp_path / "run", run, resolution="other"), run)
    there, here = old.target_emb.weight.unflatten(0, (4, 4)), module.target_emb.weight.unflatten(0, (3, 6))
    fresh = engine_of(lambda: Transformer(run.model)).module.target_emb.weight.unflatten(0, (3, 6))
    assert torch.equal(here[:, :4], there[:3]) and torch.equal(here[:, 4:], fresh[:, 4:])
    with pytest.raises(UserError, match=r"model.order is random there and raster here; set model.order=random"):
        fit(tmp_path / "run", transformer_run())


# --- What is refused ---

TOKENIZERS = {
    "resolution": (
        {"resolution": 32},
        {},
        "model.resolution is 16 there and 32 here; set .*or start_from.resolution=other",
    ),
    "channels": (
        {"channels": 64},
        {"codebook": "new"},
        r"decoder.conv_out.weight is \[3, 32, 3, 3\] instead of \[3, 64",
    ),
    "multipliers": ({"channel_multipliers": [1, 2, 1]}, {}, r"set model.channel_multipliers=\[1,1,1\]"),
    "depth": ({"res_blocks": 2}, {}, "block.1.norm1.weight is not there .*set model.res_blocks=1"),
    "latents": ({"latent_channels": 8}, {}, r"decoder.conv_in.weight is \[32, 16, 3, 3\] .*model.latent_channels=16"),
    "groups": ({"norm_groups": 16}, {}, "set model.norm_groups=32"),
    "attention": ({"attention_resolutions": [4]}, {}, r"attn.0.norm.weight is not there.*attention_resolutions=\[\]"),
    "codes": (
        quantizer(num_codes=16),
        {},
        r"quantizer.codebook is \[32, 16\] .*start_from.codebook=rows, kmeans or new",
    ),
    "dimension": (quantizer(dim=8), {"resolution": "other"}, "model.quantizer.dim is 16 there and 8 here"),
    "too many centres": (quantizer(num_codes=64), {"codebook": "kmeans"}, "too few for 64 .*codebook=rows"),
    "kind": (quantizer(kind="vq"), {"codebook": "rows"}, "kind is ibq there and vq here; .*codebook=new"),
    "angle": (quantizer(l2_normalize=True), {}, "l2_normalize is False there and True here"),
    "projector": (quantizer(projector={"kind": "linear"}), {}, "model.quantizer.projector"),
    "no codebook": ({"quantizer": {"kind": "fsq", "levels": [8, 4]}}, {"codebook": "rows"}, "codebook=new"),
}
TRANSFORMERS = {
    "classes": ({"num_classes": 9}, {}, r"class_emb.weight is \[4, 32\] instead of \[10, 32\].*start_from.classes=new"),
    "codes": ({"vocab_size": 64}, {"classes": "new"}, r"tok_emb.weight is \[32, 32\] .*of another tokenizer"),
    "tokens": ({"tokens_per_side": 8}, {}, "start_from.resolution=other"),
    "grids": (
        {"grids": [[4, 8]]},
        {},
        r"grids is unset there and \[\[4,8\]\] here; set model.grids=null, or start_from",
    ),
    "depth": ({"depth": 3}, {}, "blocks.2.* is not there .*set model.depth=2"),
    "width": ({"width": 64}, {}, r"tok_emb.weight is \[32, 32\] instead of \[32, 64\]"),
    "heads": ({"heads": 4}, {}, "model.heads is 2 there and 4 here; set model.heads=2"),
    "rotary": ({"rope_base": 100.0}, {}, "set model.rope_base=10000.0"),
    "norms": ({"shared_adaln": True}, {}, "set model.shared_adaln=False"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_differs_is_refused(places, name):
    model, options, said = TOKENIZERS[name]
    with pytest.raises(UserError, match=said) as caught:
        fit(places / "tokenizer", tokenizer_run(**model), **options)
    assert str(places) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_that_differs_is_refused(places, name):
    model, options, said = TRANSFORMERS[name]
    with pytest.raises(UserError, match=said) as caught:
        fit(places / "transformer", transformer_run(**model), **options)
    assert str(places) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_another_discriminator_is_refused_unless_it_is_left(places):
    run = tokenizer_run(gan={"discriminator": {"channels": 16, "layers": 2}})
    with pytest.raises(UserError, match=r"t.ckpt: discriminator main.0.weight \[8, 3, 4, 4\]: .*channels is 8 .*also="):
        fit(places / "t.ckpt", run, resolution="other")
    assert became(fit(places / "t.ckpt", run, resolution="other", also=()))["discriminator"] == "left"


def test_codes_of_another_tokenizer_are_refused(tmp_path, tokenizer, places):
    config = transformer_run().model
    wide = replace(config, width=64, heads=1, tokens_per_side=16)
    pair = (tokenizer.config, tokenizer.state_dict())
    torch.save(
        {"state_dict": seed_voken.write_transformer(wide, Transformer(wide).state_dict(), pair)}, tmp_path / "ar.ckpt"
    )
    run = transformer_run(width=64, heads=1, tokens_per_side=16)
    start = TransformerStartConfig(place=str(tmp_path / "ar.ckpt"))
    source = open_place(Transformer, start)
    with pytest.raises(
        UserError, match=r"tok_emb.weight is of codes of another tokenizer .*allow_other_tokenizer=true"
    ):
        fit_transformer(source, run, start, "another")
    assert became(fit_transformer(source, run, start, source.tokenizer))["tokenizer"] == "left"
    inside = fit(tmp_path / "ar.ckpt", tokenizer_run(), resolution="other")  # and a tokenizer run takes that one
    assert became(inside)["encoder"] == "taken"


def test_files_that_hold_something_else(tmp_path, places, tokenizer):
    state = tokenizer.state_dict()
    name = next(iter(state))
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.yaml").write_text((places / "tokenizer" / "config.yaml").read_text())
    write_tensors(tmp_path / "short" / "model.safetensors", {n: t for n, t in state.items() if n != name})
    torch.save(
        {"state_dict": seed_voken._reference_names({n: t for n, t in state.items() if n != name})}, tmp_path / "x.ckpt"
    )
    adam = torch.load(places / "adam.ckpt", weights_only=True)
    del adam["optimizer_states"][0]["state"][3]
    torch.save(adam, tmp_path / "adam.ckpt")
    (tmp_path / "notes.txt").write_text("no weights")
    data = bytearray((places / "t.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(data)
    for place, said in (
        ("short", f"missing tensors: {name}; write the file again"),
        ("x.ckpt", f"missing tensors: {name}|no averaged weights"),
        ("adam.ckpt", r"optimizer_states\[0\]: is not Adam's .*leave it out: start_from.also="),
        ("notes.txt", "not a file of weights"),
        ("absent", "no model at"),
        ("damaged.ckpt", "damaged"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            fit(tmp_path / place, tokenizer_run(), resolution="other")
        assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1, place
    with pytest.raises(UserError, match="holds no Transformer but a Tokenizer"):
        fit(places / "t.ckpt", transformer_run())
    with pytest.raises(UserError, match=r"config.yaml is of a Tokenizer; give the folder of a Transformer"):
        fit(places / "tokenizer", transformer_run())
    with pytest.raises(UserError, match="one set of weights"):
        fit(places / "tokenizer", tokenizer_run(), weights="raw")


# --- Config and places ---


def test_a_place_alone_or_with_options():
    assert tokenizer_run("x.ckpt").start == TokenizerStartConfig(place="x.ckpt")
    options = {"place": "x", "codebook": "kmeans", "also": ["lecam"]}
    assert tokenizer_run(options).start == TokenizerStartConfig(place="x", codebook="kmeans", also=("lecam",))
    assert transformer_run({"place": "x", "classes": "new"}).start.classes == "new"
    assert transformer_run().start is None
    for wrong in ({"codebook": "rows"}, {"place": "x", "codebok": "rows"}, {"place": "x", "codebook": "some"}):
        with pytest.raises(ConfigError):
            tokenizer_run(wrong)
    with pytest.raises(ConfigError, match="would replace the codebook of start_from"):
        given = {"data": {"train": "a"}, "training": {"max_steps": 1}, "model": TOKENIZER}
        parse_config(TokenizerRunConfig, given | {"codebook_start": {"kmeans": True}, "start_from": "x"})


def test_places_on_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("ibq.training.start_from.places.downloaded", lambda name: asked.append((name,)))
    monkeypatch.setattr("ibq.training.start_from.places.downloaded_file", lambda *names: asked.append(names))
    monkeypatch.chdir(tmp_path)
    for place in ("me/mine", "me/mine/x.ckpt", "TencentARC/IBQ-Tokenizer-1024"):
        local_place(place)
    assert asked == [("me/mine",), ("me/mine", "x.ckpt"), ("TencentARC/IBQ-Tokenizer-1024", "imagenet256_1024.ckpt")]
    with pytest.raises(UserError, match="holds several models; give one of FoundationVision/LlamaGen/vq_ds16"):
        local_place("FoundationVision/LlamaGen")
    (tmp_path / "runs").mkdir()
    assert str(local_place("runs/mine")) == "runs/mine" and len(asked) == 3
