"""Folders and repositories of the Hub: what is written, what is read, and what a model card says."""

import hashlib
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from support import ROOT
from support.golden import golden_dir
from support.processes import run_script
from support.training import make_workplace, train_here, write_best

import ibq
import yaml
from ibq import hub
from ibq.config import UserError, config_to_dict
from ibq.hub import CardFacts, from_pretrained, push_folder, push_to_hub, save_pretrained
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import Transformer, TransformerConfig
from ibq.quantizers import FSQConfig, IBQConfig, LFQConfig, QuantizerConfig
from ibq.training.checkpoint import weights_hash
from tools import convert
from tools.lib.evaluate import record as evaluate_record


def small_tokenizer(quantizer: QuantizerConfig | None = None) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(
        TokenizerConfig(
            resolution=16,
            channels=32,
            channel_multipliers=(1, 1),
            res_blocks=1,
            attention_resolutions=(),
            latent_channels=32,
            quantizer=quantizer or IBQConfig(num_codes=64, dim=16),
        )
    ).eval()


def small_transformer() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=64, num_classes=9, tokens_per_side=8, depth=1, width=64, heads=2)
    return Transformer(config).eval()


MODELS = {
    "tokenizer": small_tokenizer,
    "fsq": lambda: small_tokenizer(FSQConfig(levels=(4, 4))),
    "transformer": small_transformer,
}


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def record_of(tokenizer: Tokenizer, path: Path, **changes) -> Path:
    """The JSON file of an evaluation of a tokenizer, by the functions that write the real ones."""
    argv = ["reconstruction", "--tokenizer", "/home/somebody/t", "--images", "/home/somebody/val-*.tar"]
    record = evaluate_record.start("reconstruction", argv, torch.device("cpu"))
    record |= {
        "metrics": {"psnr": 21.774499, "rfid": float("nan"), "images": 343.0},
        "image_count": 343,
        "images": "/home/somebody/val-*.tar",
        "precision": "fp32",
        "protocol": {"image_size": 16},
        "inputs": {"tokenizer_sha256": weights_hash(tokenizer.state_dict()), "images_sha256": "ab" * 32},
    }
    evaluate_record.write(path, record | changes)
    return path


# --- Folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_same_model(tmp_path, name):
    model = MODELS[name]()
    folder = save_pretrained(model, tmp_path / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaders = (from_pretrained, ibq.load_transformer if name == "transformer" else ibq.load_tokenizer)
    for load in loaders:
        loaded = load(folder, device="cpu")
        assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    described = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model"]) == {k: described[k] for k in ("kind", "config")}
        assert file.metadata()["format"] == "pt"  # as transformers and the Hub expect
    assert described["config"] == json.loads(json.dumps(config_to_dict(model.config)))


def test_the_api_has_the_functions():
    assert ibq.save_pretrained is save_pretrained and ibq.from_pretrained is from_pretrained
    assert ibq.push_to_hub is push_to_hub and ibq.CardFacts is CardFacts


def test_the_hubs_client_is_not_imported_before_it_is_needed():
    code = "import sys, ibq.hub; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_saving_again_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for model in (small_tokenizer(), small_transformer()):
        save_pretrained(model, tmp_path)
    assert isinstance(from_pretrained(tmp_path, device="cpu"), Transformer)
    assert (tmp_path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob(".tmp*"))


def test_what_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(UserError, match="a Linear cannot be saved"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(UserError, match="not a model of this project"):
        from_pretrained(tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_pretrained(small_transformer(), tmp_path / "taken" / "x")


# --- Model cards ----------------------------------------------------------------------------------


def test_card_of_a_measured_tokenizer(tmp_path):
    tokenizer = small_tokenizer()
    facts = CardFacts(
        name="Emoji tokenizer",
        data="3,438 emoji at 16 px",
        steps=1550,
        license="mit",
        evaluations=[record_of(tokenizer, tmp_path / "figures.json")],
    )
    folder = save_pretrained(tokenizer, tmp_path / "folder", facts)
    text, head = (folder / "README.md").read_text(), front_matter(folder)
    assert head["license"] == "mit" and head["library_name"] == "ibq"
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "psnr", "name": "psnr", "value": 21.774499}
    assert {metric["name"] for metric in result["metrics"]} == {"psnr", "images"}  # NaN is no figure
    for said in (
        "# Emoji tokenizer",
        "| data | 3,438 emoji at 16 px |",
        "| steps | 1,550 |",
        "| psnr | 21.7745 |",
        weights_hash(tokenizer.state_dict()),
        "ab" * 32,
        f"torch {version('torch')}",
        "num_codes: 64",
        "2412.02692",
        "343 images",
    ):
        assert said in text, said
    assert "/home/somebody" not in text
    # The Hub's own reader takes it.
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert [found.metric_value for found in card.data.eval_results] == [21.774499, 343.0]
    assert card.data.model_name == "Emoji tokenizer"


def test_card_without_facts_says_so(tmp_path):
    for model in (small_tokenizer(LFQConfig(dim=6)), small_transformer()):
        folder = save_pretrained(model, tmp_path / type(model).__name__)
        text = (folder / "README.md").read_text()
        assert "| data | not stated |" in text and "| steps | not stated |" in text and "None measured." in text
        assert "Not stated" in text.split("## Licence")[1] and "license" not in front_matter(folder)
        assert ("2409.04410" if isinstance(model, Tokenizer) else "2412.02692") in text
        huggingface_hub.ModelCard.load(folder / "README.md")
    assert "1711.00937" not in text
    assert "2309.15505" in hub.model_card(MODELS["fsq"](), CardFacts())


def test_card_of_generation(tmp_path):
    transformer = small_transformer()
    record = evaluate_record.start("generation", ["generation", "--samples", "x.npz"], torch.device("cpu"))
    record |= {
        "metrics": {"inception_score": 12.5, "imagenet": {"fid": 3.25}},
        "inputs": {"samples_sha256": "cd" * 32},
        "image_count": 50_000,
        "sampler": {"guidance_scale": 2.25},
        "seed": 0,
        "checkpoint": {"tokenizer": "ef" * 32, "transformer": weights_hash(transformer.state_dict())},
    }
    evaluate_record.write(tmp_path / "generation.json", record)
    facts = CardFacts(evaluations=[tmp_path / "generation.json"], tokenizer="me/my-tokenizer")
    text = hub.model_card(transformer, facts)
    for said in ("| imagenet: fid | 3.25 |", "50,000 images", '"guidance_scale": 2.25', "me/my-tokenizer", "cd" * 32):
        assert said in text, said


def test_figures_of_other_weights_are_refused(tmp_path):
    tokenizer = small_tokenizer()
    path = record_of(tokenizer, tmp_path / "figures.json")
    with torch.no_grad():
        tokenizer.quant_conv.bias.add_(1)
    with pytest.raises(UserError, match="measured with other weights"):
        save_pretrained(tokenizer, tmp_path / "folder", CardFacts(evaluations=[path]))
    assert not (tmp_path / "folder").exists()
    with pytest.raises(UserError, match="measured with other weights"):
        hub.model_card(small_transformer(), CardFacts(evaluations=[path]))
    for text, said in (("{", "not a readable JSON"), ("[]", "not the record"), ('{"format": 1}', "not the record")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            hub.model_card(tokenizer, CardFacts(evaluations=[path]))
    record_of(tokenizer, path, metrics=3)
    with pytest.raises(UserError, match="`metrics` and `inputs` are missing"):
        hub.model_card(tokenizer, CardFacts(evaluations=[path]))


# --- The command line -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_becomes_a_folder(tmp_path):
    place = make_workplace(tmp_path / "place")
    assert train_here("tokenizer", ["--config", str(place / "tokenizer.yaml"), f"output={place / 'run'}"]) == 0
    done = run_script(
        *("tools/convert.py", "hub", str(place / "run"), str(tmp_path / "folder")),
        *("--data", "40 pictures", "--license", "mit"),
    )
    assert done.returncode == 0, done.stderr
    best = json.loads((place / "run" / "best" / "info.json").read_text())["step"]
    text = (tmp_path / "folder" / "README.md").read_text()
    for said in (f"| steps | {best} |", "| data | 40 pictures |", "averaged (EMA)"):
        assert said in text, said
    # A run folder means what it means to tools/evaluate.py, so that figures measured there are of these weights.
    expected = ibq.load_tokenizer(place / "run", device="cpu").state_dict()
    loaded = from_pretrained(tmp_path / "folder", device="cpu").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    step = place / "run" / "checkpoints" / "step-00000004"
    convert.main(["hub", str(step), str(tmp_path / "folder")])
    assert "`step-00000004`" in (tmp_path / "folder" / "README.md").read_text()
    write_best(tmp_path / "ar" / "best", small_transformer())
    convert.main(["hub", str(tmp_path / "ar"), str(tmp_path / "ar-folder")])
    assert isinstance(from_pretrained(tmp_path / "ar-folder", device="cpu"), Transformer)
    with pytest.raises(UserError, match="no model at"):
        convert.main(["hub", str(tmp_path), str(tmp_path / "none")])


def test_an_imported_model_becomes_a_folder(tmp_path):
    checkpoint, out = golden_dir() / "tokenizer_small.ckpt", tmp_path / "t.safetensors"
    convert.main(["import", "seed-voken", str(checkpoint), str(out)])
    convert.main(["hub", str(out), str(tmp_path / "folder")])
    text = (tmp_path / "folder" / "README.md").read_text()
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for said in ("`tokenizer_small.ckpt` of IBQ (SEED-Voken)", digest, "| steps | 1,234 |", "stated by the publisher"):
        assert said in text, said
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata()["source_sha256"] == digest
    with pytest.raises(UserError, match="--private"):
        convert.main(["hub", str(out), str(tmp_path / "folder"), "--private"])


# --- Repositories: the client's calls are recorded, the network is never asked --------------------


class RecordedHub:
    """Keeps what would go over the network."""

    def __init__(self):
        self.created, self.uploaded = [], {}

    def create_repo(self, api, repository, **options):
        self.created.append((repository, options))

    def upload_folder(self, api, *, folder_path, repo_id, allow_patterns, commit_message, **options):
        for name in allow_patterns:
            self.uploaded[name] = (Path(folder_path) / name).read_bytes()
        oid = "0" * 40
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/{oid}",
            commit_message=commit_message,
            commit_description="",
            oid=oid,
        )

    def snapshot_download(self, repository, *, revision, token, allow_patterns, **options):
        self.asked = (repository, revision)
        return str(self.folder)


@pytest.fixture
def recorded(monkeypatch) -> RecordedHub:
    found = RecordedHub()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *a, **k: found.create_repo(*a, **k))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda *a, **k: found.upload_folder(*a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: found.snapshot_download(*a, **k))
    return found


def test_push_uploads_the_three_files_and_they_come_back(recorded, tmp_path):
    tokenizer = small_tokenizer()
    address = push_to_hub(tokenizer, "me/tokenizer", CardFacts(license="mit"), private=True)
    assert address.startswith("https://huggingface.co/me/tokenizer/commit/")
    assert recorded.created == [("me/tokenizer", {"private": True, "exist_ok": True})]
    assert sorted(recorded.uploaded) == ["README.md", "config.json", "model.safetensors"]
    recorded.folder = tmp_path / "cache"
    recorded.folder.mkdir()
    for name, data in recorded.uploaded.items():
        (recorded.folder / name).write_bytes(data)
    loaded = from_pretrained("me/tokenizer", revision="main", device="cpu")
    assert recorded.asked == ("me/tokenizer", "main")
    assert all(torch.equal(t, tokenizer.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_push_from_the_command_line(recorded, tmp_path):
    checkpoint, out = golden_dir() / "tokenizer_small.ckpt", tmp_path / "t.safetensors"
    convert.main(["import", "seed-voken", str(checkpoint), str(out)])
    convert.main(["hub", str(out), str(tmp_path / "folder"), "--push", "me/small"])
    assert recorded.created == [("me/small", {"private": False, "exist_ok": True})]
    assert (
        hashlib.sha256(recorded.uploaded["model.safetensors"]).hexdigest()
        == hashlib.sha256((tmp_path / "folder" / "model.safetensors").read_bytes()).hexdigest()
    )


def test_an_incomplete_folder_is_not_pushed(recorded, tmp_path):
    folder = save_pretrained(small_transformer(), tmp_path)
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"has no README\.md"):
        push_folder(folder, "me/x")
    assert not recorded.created


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    """The real client, at an address where nothing listens."""
    code = (
        "import sys, ibq\nfrom ibq.config import UserError\n"
        "for call in (lambda: ibq.from_pretrained('me/none'), lambda: ibq.hub.push_folder(sys.argv[1], 'me/none')):\n"
        "    try:\n        call()\n    except UserError as error:\n        print(error)\n"
    )
    folder = save_pretrained(small_transformer(), tmp_path / "folder")
    done = subprocess.run(
        [sys.executable, "-c", f"import ibq.hub\n{code}", str(folder)],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_x",
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 2, (done.stdout, done.stderr)
    assert all(line.startswith("me/none: ") for line in lines)
    assert "a repository that you may read" in lines[0] and "hf auth login" in lines[1]
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
