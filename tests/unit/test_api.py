"""The Python API: loading models from runs and published checkpoints, and generating images."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from support.golden import golden_dir, golden_json
from support.published import read_tokenizer, read_transformer
from support.training import CODES, SIDE, make_workplace, train_here

import ibq
from ibq.api import same_codes_as, trained_on
from ibq.config import UserError
from ibq.data.transforms import to_uint8
from ibq.interop import seed_voken
from ibq.interop.seed_voken import transformer_config_from_reference
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.pixels import decode_in_blocks
from ibq.sampler import SamplerConfig
from ibq.sampling import sample_codes


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many tiny operations are slower on several threads, above all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Run folders of a tokenizer and a transformer that fit each other."""
    place = make_workplace(tmp_path_factory.mktemp("api"))
    for stage, rate in (("tokenizer", 1e-3), ("transformer", 0.1)):  # a head of zeros would make all codes alike
        argv = ["--config", str(place / f"{stage}.yaml"), f"output={place / stage}", f"optimizer.learning_rate={rate}"]
        assert train_here(stage, [*argv, "ema_decay=0.0"]) == 0
    return place


@pytest.fixture(scope="module")
def loaded(models):
    return (
        ibq.load_tokenizer(models / "tokenizer", device="cpu"),
        ibq.load_transformer(models / "transformer", device="cpu"),
    )


def test_from_run_folders(models, loaded):
    tokenizer, transformer = loaded
    assert isinstance(tokenizer, Tokenizer) and isinstance(transformer, Transformer)
    for model in loaded:
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    again = ibq.load_tokenizer(str(models / "tokenizer" / "best"), device="cpu")
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_of_a_checkpoint_its_run_tells_whose_codes_it_has(models, loaded):
    """A tokenizer that was trained as a whole has its own."""
    for stage, expected in (("tokenizer", None), ("transformer", "test")):
        (checkpoint, *_) = sorted((models / stage / "checkpoints").iterdir())
        for place in (models / stage, checkpoint):
            assert (trained_on(place), same_codes_as(place)) == (expected, None)


def test_encode_and_decode(loaded):
    tokenizer, _ = loaded
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = tokenizer.encode(images)
    assert codes.shape == (2, SIDE, SIDE) and codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < CODES
    assert torch.equal(tokenizer.decode(codes), tokenizer(images).reconstruction)
    assert tokenizer.encode(torch.rand(1, 3, 24, 32)).shape == (1, 6, 8)
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match="codebook has 32"):
        tokenizer.decode(torch.full((1, SIDE, SIDE), CODES))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_tokenizer_from_a_published_checkpoint(weights):
    settings = golden_json("tokenizer_small")
    path = golden_dir() / settings["checkpoint"]["file"]
    tokenizer = ibq.load_tokenizer(path, weights=weights, device="cpu")
    expected = Tokenizer(seed_voken.tokenizer_config_from_reference(settings["config"]))
    expected.load_state_dict(read_tokenizer(path, weights))
    size = settings["config"]["ddconfig"]["resolution"]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = expected.eval().encode(images)
    assert torch.equal(tokenizer.encode(images), codes)
    assert torch.equal(tokenizer.decode(codes), expected.decode(codes))


def test_weights_without_a_word_of_their_model(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has no config\.yaml, and model\.safetensors does not say what it holds"):
        ibq.load_tokenizer(tmp_path, device="cpu")
    with pytest.raises(UserError, match="does not say which model it holds; give the folder with its config"):
        ibq.load_tokenizer(tmp_path / "model.safetensors", device="cpu")


def test_images_of_whole_numbers_are_refused():
    path = golden_dir() / golden_json("tokenizer_small")["checkpoint"]["file"]
    with pytest.raises(ValueError, match=r"got torch\.uint8; give images\.float\(\) / 127\.5 - 1"):
        ibq.load_tokenizer(path, device="cpu").encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_names_that_a_wrapper_has_lengthened(wrapper, tmp_path, capsys):
    """As DDP, torch.compile and Lightning do it."""
    path = golden_dir() / golden_json("tokenizer_small")["checkpoint"]["file"]
    state = torch.load(path, weights_only=True)["state_dict"]
    wrapped = {f"{wrapper}{name}".replace(".conv_in.", "._orig_mod.conv_in."): value for name, value in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.ckpt")
    found = ibq.load_tokenizer(tmp_path / "wrapped.ckpt", weights="raw", device="cpu").state_dict()
    expected = ibq.load_tokenizer(path, weights="raw", device="cpu").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    said = capsys.readouterr().err
    assert said.count(f"the names of its weights begin with {wrapper}, which is taken off") == 1


def test_transformer_from_a_published_checkpoint():
    settings = golden_json("ar_small")
    path = golden_dir() / settings["checkpoint"]["file"]
    config = transformer_config_from_reference(settings["params"])
    transformer = ibq.load_transformer(path, config=config, device="cpu")
    assert transformer.config == config and not transformer.training
    for name, value in read_transformer(path).items():
        assert torch.equal(transformer.state_dict()[name], value), name


def test_published_transformer_without_a_config(tmp_path):
    """Depth and width are read from the shapes, heads of 64 channels and 16 x 16 tokens are the paper's."""
    config = TransformerConfig(depth=2, vocab_size=32, num_classes=3)
    torch.manual_seed(0)
    model = Transformer(config).eval()
    names = {"class_emb.weight": "class_emb.embedding_table.weight"}
    state = {f"transformer.{names.get(name, name)}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "ar.ckpt")
    loaded = ibq.load_transformer(tmp_path / "ar.ckpt", device="cpu")
    assert (loaded.config.num_heads, loaded.config.model_width, loaded.config.tokens_per_side) == (2, 128, 16)
    codes, classes = torch.randint(0, 32, (1, 256)), torch.tensor([1])
    with torch.no_grad():
        assert torch.equal(loaded.logits(codes, classes), model.logits(codes, classes))
    narrow = Transformer(dataclasses.replace(config, width=48, heads=2)).state_dict()
    state = {f"transformer.{names.get(name, name)}": value for name, value in narrow.items()}
    torch.save({"state_dict": state}, tmp_path / "ar.ckpt")
    with pytest.raises(UserError, match="heads of 64 channels"):
        ibq.load_transformer(tmp_path / "ar.ckpt")


def test_what_cannot_be_loaded(models, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        ibq.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no model at"):
        ibq.load_transformer(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match="published checkpoint"):
        ibq.load_transformer(golden_dir() / golden_json("tokenizer_small")["checkpoint"]["file"])
    (tmp_path / "broken.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="published checkpoint"):
        ibq.load_transformer(tmp_path / "broken.ckpt")
    with pytest.raises(UserError, match=r"not a model of this kind.*config\.yaml"):
        ibq.load_transformer(models / "tokenizer")
    with pytest.raises(AttributeError):
        ibq.no_such_thing  # noqa: B018


def test_generate(loaded):
    images = ibq.generate(*loaded, classes=[0, 2, 1], seed=5)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.uint8 and images.device.type == "cpu"
    assert torch.equal(images, ibq.generate(*loaded, classes=[0, 2, 1], seed=5))
    assert not torch.equal(images, ibq.generate(*loaded, classes=[0, 2, 1], seed=50))
    assert ibq.generate(*loaded, classes=[]).shape == (0, 3, 16, 16)


def test_generate_is_sampling_and_decoding(loaded):
    tokenizer, transformer = loaded
    settings = {"guidance_scale": 1.5, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
    codes = sample_codes(transformer, [1, 2], [7, 8], SamplerConfig(**settings))
    assert torch.equal(ibq.generate(*loaded, classes=[1, 2], seed=7, **settings), decode_in_blocks(tokenizer, codes))
    near = to_uint8(tokenizer.decode(codes)).int() - decode_in_blocks(tokenizer, codes).int()
    assert near.abs().max() <= 1


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(loaded, scale):
    classes = [0, 1, 2] * 6  # more than one block
    together = ibq.generate(*loaded, classes=classes, seed=0, guidance_scale=scale)
    assert len({tuple(image.flatten().tolist()) for image in together}) > 9
    for i in (0, 5, 16, 17):
        alone = ibq.generate(*loaded, classes=[classes[i]], seed=i, guidance_scale=scale)
        assert torch.equal(alone[0], together[i])


def test_generate_leaves_the_random_numbers_alone(loaded):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ibq.generate(*loaded, classes=[0])
    assert torch.equal(torch.rand(3), expected)


def test_generate_reports_progress(loaded):
    seen = []
    ibq.generate(*loaded, classes=[0] * 18, progress=lambda done, count: seen.append((done, count)))
    assert seen == [(16, 18), (18, 18)]


def test_generate_checks_its_input(loaded):
    for settings in ({"classes": [99]}, {"classes": [0], "temperature": -1.0}, {"classes": [0], "seed": -1}):
        with pytest.raises(ValueError, match="out of range"):
            ibq.generate(*loaded, **settings)
