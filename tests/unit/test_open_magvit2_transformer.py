"""Open-MAGVIT2's transformers: names and shapes by its public configs, values by its formulas over its names."""

import math

import pytest
import torch
from support.published import open_magvit2_state
from torch import Tensor

import ibq
from ibq.config import UserError
from ibq.interop import open_magvit2
from ibq.interop.families import family_of, read_published
from ibq.interop.open_magvit2_transformer import reference_name, transformer_config_from_reference, transformer_state
from ibq.interop.published import Hints
from ibq.models.heads import BitsHeadConfig, FactorisedHeadConfig
from ibq.models.tokenizer import Tokenizer
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import LFQConfig
from ibq.sampler import SamplerConfig
from ibq.sampling import sample_codes
from tools import convert

State = dict[str, Tensor]


def public_arguments(layers: int, inner: int, heads: int, width: int) -> dict:
    """Of configs/Open-MAGVIT2/gpu/imagenet_conditional_llama_{B,L,XL}.yaml."""
    return {
        "vocab_size": 512, "block_size": 256, "spatial_n_layer": layers, "factorized_n_layer": inner,
        "factorized_bits": [6, 12], "n_head": heads, "dim": width, "cond_dim": width, "token_drop": 0.1,
        "resid_dropout_p": 0.1, "token_factorization": True, "class_num": 1000,
    }  # fmt: skip


# Name: (arguments, millions of parameters that its pages report, parameters by the shapes of its code).
PUBLIC = {
    "B": (public_arguments(24, 2, 16, 1024), 343, 343_570_432),
    "L": (public_arguments(36, 3, 20, 1280), 804, 804_362_240),
    "XL": (public_arguments(48, 4, 24, 1536), 1_500, 1_486_679_040),
}


def shapes_of(arguments: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of its GPT, by its constructor."""
    width, (first, second) = arguments["dim"], (2**bits for bits in arguments["factorized_bits"])
    hidden = -(-int(2 * 4 * width / 3) // 256) * 256
    shapes = {"pre_emb.weight": (first, width), "post_emb.weight": (second, width), "norm.weight": (width,)}
    shapes |= {"head.0.weight": (first, width), "head.1.weight": (second, width)}
    shapes |= {"class_emb.embedding_table.weight": (arguments["class_num"] + 1, width)}
    stacks = {"spatial_blocks": arguments["spatial_n_layer"], "factorized_blocks": arguments["factorized_n_layer"]}
    for stack, count in stacks.items():
        for number in range(count):
            block = f"{stack}.{number}."
            shapes |= {f"{block}attention.wqkv.weight": (3 * width, width), f"{block}attention.wo.weight": (width,) * 2}
            shapes |= {f"{block}feed_forward.{name}.weight": (hidden, width) for name in ("w1", "w3")}
            shapes |= {f"{block}feed_forward.w2.weight": (width, hidden)}
            shapes |= {f"{block}{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize(("arguments", "millions", "count"), PUBLIC.values(), ids=PUBLIC)
def test_public_configs(arguments, millions, count, monkeypatch):
    shapes = shapes_of(arguments)
    config = transformer_config_from_reference(arguments)
    assert config.digits == (64, 4096) and config.num_tokens == 256 and not config.adaln
    with torch.device("meta"):
        state = Transformer(config).state_dict()
        written = transformer_state(config, state)
        assert {name: tuple(value.shape) for name, value in written.items()} == shapes
    assert sum(value.numel() for value in state.values()) == sum(map(math.prod, shapes.values())) == count
    assert round(count / 1e6, -2 if millions > 1_000 else 0) == pytest.approx(millions, abs=1)
    monkeypatch.setattr(open_magvit2, "read_state", lambda path: written)
    (found,) = open_magvit2.read("x.ckpt")
    same = ("vocab_size", "num_classes", "code_grids", "depth", "num_heads", "model_width", "head", "adaln")
    assert all(getattr(found.config, name) == getattr(config, name) for name in same)


SMALL = public_arguments(3, 2, 2, 64) | {"block_size": 16, "factorized_bits": [2, 4], "class_num": 5, "n_kv_head": 2}


def small_state() -> State:
    generator = torch.Generator().manual_seed(0)
    arguments = {**SMALL, "cond_dim": 64}
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes_of(arguments).items()}
    return {name: 1 + value if "norm" in name else value for name, value in state.items()}


def nll_of(state: State, codes: Tensor, classes: Tensor, heads: int, side: int) -> Tensor:
    """Negative log likelihoods [B, T] of codes [B, T], by its forward pass over its names, in float64."""
    state = {name.removeprefix("transformer."): value.double() for name, value in state.items()}
    first, second = codes % 4, codes // 4  # of 2 and 4 bits
    width = state["norm.weight"].numel()
    size = width // heads
    steps = 10000.0 ** -(torch.arange(0, size // 2, 2).double() / (size // 2))
    rows, columns = (torch.arange(side**2) // side, torch.arange(side**2) % side)
    angles = torch.cat([rows[:, None] * steps, columns[:, None] * steps], dim=1)  # [tokens, size / 2]
    turns = torch.cat([torch.zeros(1, size // 2), torch.polar(torch.ones_like(angles), angles)])

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * state[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:  # [..., T, heads, size]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[: x.shape[-3], None]).flatten(-2)

    def block(x: Tensor, name: str) -> Tensor:
        q, k, v = (norm(x, f"{name}.attention_norm") @ state[f"{name}.attention.wqkv.weight"].T).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, size)) for part in (q, k, v))
        scores = torch.einsum("...qhd,...khd->...hqk", turned(q), turned(k)) / size**0.5
        seen = torch.ones(scores.shape[-2:]).tril().bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + torch.einsum("...hqk,...khd->...qhd", weights, v).flatten(-2) @ state[f"{name}.attention.wo.weight"].T
        h = norm(x, f"{name}.ffn_norm")
        gate, up = (h @ state[f"{name}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
        return x + (gate * gate.sigmoid() * up) @ state[f"{name}.feed_forward.w2.weight"].T

    embedded = state["pre_emb.weight"][first] + state["post_emb.weight"][second]
    x = torch.cat([state["class_emb.embedding_table.weight"][classes][:, None], embedded[:, :-1]], dim=1)
    for number in range(SMALL["spatial_n_layer"]):
        x = block(x, f"spatial_blocks.{number}")
    inner = torch.stack([x, state["pre_emb.weight"][first]], dim=-2)  # [B, T, 2, C]
    for number in range(SMALL["factorized_n_layer"]):
        inner = block(inner, f"factorized_blocks.{number}")
    hidden, nll = norm(inner, "norm"), 0
    for part, digits in enumerate((first, second)):
        logits = hidden[:, :, part] @ state[f"head.{part}.weight"].T
        nll = nll - logits.log_softmax(-1).gather(-1, digits[..., None])[..., 0]
    return nll


def test_a_checkpoint_computes_what_its_tensors_say_and_goes_back(tmp_path):
    state = small_state()
    first_stage = open_magvit2_state(multipliers=(1, 1, 2), bits=6, blocks=2, channels=32)
    beside = {f"first_stage_model.{name}": value for name, value in first_stage.items()}
    cache = {"transformer.spatial_blocks.0.attention.kv_cache.k_cache": torch.zeros(2)}
    torch.save({"state_dict": beside | state | cache, "epoch": 3}, tmp_path / "ar.ckpt")
    (tmp_path / "ar.yaml").write_text(
        f"model: {{init_args: {{transformer_config: {{params: {SMALL!r}}}}}}}".replace("True", "true")
    )
    command = ["import", "open-magvit2", tmp_path / "ar.ckpt", tmp_path / "ar.safetensors"]
    convert.main([str(word) for word in [*command, "--config", tmp_path / "ar.yaml"]])
    model = ibq.load_transformer(tmp_path / "ar.safetensors", device="cpu")
    tokenizer = ibq.load_tokenizer(tmp_path / "ar.tokenizer.safetensors", device="cpu")
    assert tokenizer.config.quantizer == LFQConfig(dim=6) and tokenizer.quantizer.num_codes == model.config.vocab_size
    assert model.config == transformer_config_from_reference(SMALL)

    generator = torch.Generator().manual_seed(1)
    codes, classes = torch.randint(64, (3, 16), generator=generator), torch.tensor([0, 4, 5])
    expected = nll_of(state, codes, classes, heads=2, side=4)
    torch.testing.assert_close(model.double()(codes, classes).double(), expected, rtol=1e-6, atol=1e-6)
    drawn = sample_codes(model.float(), [1, 2], [3, 4], SamplerConfig(rows_per_block=2, guidance_scale=1.9))
    assert drawn.shape == (2, 4, 4) and len(drawn.unique()) > 3

    back = ["export", tmp_path / "ar.safetensors", tmp_path / "back.ckpt", "--format", "open-magvit2"]
    convert.main([str(word) for word in [*back, "--tokenizer", tmp_path / "ar.tokenizer.safetensors"]])
    again = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert again.keys() == (beside | state).keys()
    assert all(torch.equal(again[name], value) for name, value in (beside | state).items())


def test_parts_of_a_file(tmp_path):
    """A transformer alone, and one of the two that are wanted."""
    state = small_state()
    torch.save({"state_dict": state}, tmp_path / "alone.ckpt")
    assert family_of(state) == "open-magvit2"
    config = transformer_config_from_reference(SMALL)
    (found,) = read_published(tmp_path / "alone.ckpt", hints=Hints(kind=Transformer, transformer=config))
    assert found.config == config
    with pytest.raises(ValueError, match="has no tokenizer"):
        read_published(tmp_path / "alone.ckpt", hints=Hints(kind=Tokenizer))


def test_errors_name_what_does_not_fit(tmp_path):
    state, name = small_state(), "transformer.factorized_blocks.1.attention.wo.weight"
    torch.save({"state_dict": {n: v for n, v in state.items() if n != name}}, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match=f"missing tensors: {name}"):
        open_magvit2.read(tmp_path / "less.ckpt")
    torch.save({"state_dict": state | {"transformer.surplus": torch.zeros(1)}}, tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match=r"unexpected tensors: transformer\.surplus"):
        open_magvit2.read(tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match="drop_path_rate: is not an argument"):
        transformer_config_from_reference(SMALL | {"drop_path_rate": 0.1})
    size = {"vocab_size": 64, "depth": 1, "width": 64, "heads": 1}
    for settings, message in (
        ({"head": BitsHeadConfig(), "adaln": False}, "head.kind: 'bits' does not fit Open-MAGVIT2"),
        ({"head": FactorisedHeadConfig()}, "adaln: True does not fit Open-MAGVIT2"),
        ({"head": FactorisedHeadConfig(sub_codes=(2, 4, 8)), "adaln": False}, "head.sub_codes"),
    ):
        with pytest.raises(ValueError, match=message):
            transformer_state(TransformerConfig(**size, **settings), {})
    with pytest.raises(UserError, match="leave the configuration out"):
        _import_a_tokenizer_with_a_config(tmp_path)


def _import_a_tokenizer_with_a_config(folder) -> None:
    torch.save({"state_dict": open_magvit2_state((1, 1, 2), 6, 2, 32)}, folder / "t.ckpt")
    (folder / "x.yaml").write_text("model: {init_args: {n_embed: 64}}")
    command = ["import", "open-magvit2", folder / "t.ckpt", folder / "t.safetensors", "--config", folder / "x.yaml"]
    convert.main([str(word) for word in command])


def test_names():
    assert reference_name("tok_emb.tables.1.weight") == "transformer.post_emb.weight"
    assert reference_name("head_nm.rmsnorm.weight") == "transformer.norm.weight"
