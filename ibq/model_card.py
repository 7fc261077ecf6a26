"""The model card of a folder for the Hub: what the model is, what it was trained on, measured figures with proof."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

import yaml
from ibq.config import UserError, dump_config
from ibq.evaluation import record as evaluation
from ibq.interop.families import FAMILIES
from ibq.models.tokenizer import Tokenizer
from ibq.quantizers import IBQConfig, LFQConfig
from ibq.training.checkpoint import weights_hash

NOT_STATED = "not stated"
TASKS = {"reconstruction": "image reconstruction", "generation": "class-conditional image generation"}

QUANTIZER_PAPERS = {"vq": "1711.00937", "simvq": "2411.02038", "bsq": "2406.07548", "fsq": "2309.15505"}
IBQ_PAPER = """\
@article{shi2024taming,
  title={Taming Scalable Visual Tokenizer for Autoregressive Image Generation},
  author={Shi, Fengyuan and Luo, Zhuoyan and Ge, Yixiao and Yang, Yujiu and Shan, Ying and Wang, Limin},
  journal={arXiv preprint arXiv:2412.02692},
  year={2024}
}
"""
OPEN_MAGVIT2_PAPER = """\
@article{luo2024open,
  title={Open-MAGVIT2: An Open-Source Project Toward Democratizing Auto-Regressive Visual Generation},
  author={Luo, Zhuoyan and Shi, Fengyuan and Ge, Yixiao and Yang, Yujiu and Wang, Limin and Shan, Ying},
  journal={arXiv preprint arXiv:2409.04410},
  year={2024}
}
"""
LLAMAGEN_PAPER = """\
@article{sun2024autoregressive,
  title={Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation},
  author={Sun, Peize and Jiang, Yi and Chen, Shoufa and Zhang, Shilong and Peng, Bingyue and Luo, Ping and
    Yuan, Zehuan},
  journal={arXiv preprint arXiv:2406.06525},
  year={2024}
}
"""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model's weights do not say of themselves."""

    name: str | None = None  # default: the kind and its size
    data: str | None = None  # what it was trained on
    steps: int | None = None  # of its training
    license: str | None = None  # identifier of the Hub: mit, apache-2.0, ...
    tokenizer: str | None = None  # of a transformer: the repository or name of the tokenizer that its codes are of
    origin: Mapping[str, str] = field(default_factory=dict)  # metadata of the .safetensors file it comes from
    evaluations: Sequence[Path] = ()  # JSON files of tools/evaluate.py


def model_card(model: nn.Module, facts: CardFacts) -> str:
    """The text of README.md. UserError for a record of an evaluation that is damaged or of other weights."""
    records = [(Path(path), read_record(Path(path), model)) for path in facts.evaluations]
    parts = [
        _front_matter(model, facts, records),
        f"# {_name(model, facts)}\n\n{_summary(model)}\n",
        _use(model),
        f"## Configuration\n\n```yaml\n{dump_config(model.config).strip()}\n```\n",
        _training(facts),
        _figures(records),
        f"## Licence\n\n{_license(facts) or _license_of_origin(facts)}\n",
        f"## Citation\n\n{_paper(model, facts)}\n",
    ]
    return "\n".join(parts)


def read_record(path: Path, model: nn.Module) -> dict:
    """A record of tools/evaluate.py, checked to be of these very weights; UserError otherwise."""
    record = evaluation.read_record(path)
    evaluation.require_figures(path, record)
    measured, own = measured_weights(record, model), weights_hash(model.state_dict())
    if measured != own:
        raise UserError(
            f"{path}: was measured with other weights ({_short(measured)}) than these ({_short(own)}); "
            "evaluate this model and give that file"
        )
    return record


def measured_weights(record: Mapping, model: nn.Module) -> str | None:
    """The hash of the weights of the model's kind that a record is about, where it says."""
    if record["command"] == "reconstruction":
        return record["inputs"].get("tokenizer_sha256") if isinstance(model, Tokenizer) else None
    checkpoint = record.get("checkpoint")
    kind = "tokenizer" if isinstance(model, Tokenizer) else "transformer"
    return checkpoint.get(kind) if isinstance(checkpoint, dict) else None


# --- Parts of the card ---


def _front_matter(model: nn.Module, facts: CardFacts, records: list[tuple[Path, dict]]) -> str:
    """What the Hub reads: see its documentation of model cards."""
    tokenizer = isinstance(model, Tokenizer)
    found: dict = {
        "library_name": "ibq",
        "pipeline_tag": "image-feature-extraction" if tokenizer else "unconditional-image-generation",
        "tags": ["ibq", "image-tokenizer" if tokenizer else "autoregressive-image-generation"],
    }
    if license_name := _license(facts):
        found["license"] = license_name
    if records:
        results = [_result(record) for _, record in records]
        found["model-index"] = [{"name": _name(model, facts), "results": results}]
    return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True).strip()}\n---\n"


def _result(record: Mapping) -> dict:
    task = TASKS[record["command"]]
    metrics = [{"type": name, "name": name, "value": value} for name, value in _numbers(record)]
    dataset = {"type": "custom", "name": _images_of(record)}
    return {"task": {"type": task.replace(" ", "-"), "name": task}, "dataset": dataset, "metrics": metrics}


def _name(model: nn.Module, facts: CardFacts) -> str:
    if facts.name:
        return facts.name
    config = model.config
    if isinstance(model, Tokenizer):
        return f"Image tokenizer, {config.quantizer.num_codes:,} codes, {config.resolution} px"
    return f"Class-conditional transformer, depth {config.depth}, {config.vocab_size:,} codes"


def _summary(model: nn.Module) -> str:
    config, numbers = model.config, sum(parameter.numel() for parameter in model.parameters())
    if isinstance(model, Tokenizer):
        quantizer = config.quantizer
        return (
            f"Turns images into codes and back: quantizer `{quantizer.kind}` with {quantizer.num_codes:,} codes of "
            f"{quantizer.dim} dimensions, one code for {config.downsampling} x {config.downsampling} pixels, "
            f"{numbers:,} parameters."
        )
    grids = " or ".join(f"{height} x {width}" for height, width in config.code_grids)
    return f"Draws {grids} codes of one of {config.num_classes:,} classes; {numbers:,} parameters."


def _use(model: nn.Module) -> str:
    if isinstance(model, Tokenizer):
        lines = [
            'tokenizer = ibq.from_pretrained("THIS REPOSITORY OR FOLDER")',
            "codes = tokenizer.encode(images)  # [B, 3, H, W] in [-1, 1] -> [B, h, w]",
            "images = tokenizer.decode(codes)",
        ]
    else:
        lines = [
            'transformer = ibq.from_pretrained("THIS REPOSITORY OR FOLDER")',
            'tokenizer = ibq.from_pretrained("ITS TOKENIZER")',
            "images = ibq.generate(tokenizer, transformer, classes=[0, 1, 2])  # uint8 [3, 3, H, W]",
        ]
    return "## Use\n\n```python\nimport ibq\n\n" + "\n".join(lines) + "\n```\n"


def _training(facts: CardFacts) -> str:
    origin, rows = facts.origin, [("data", facts.data or NOT_STATED)]
    steps = facts.steps if facts.steps is not None else _steps_of(origin)
    rows.append(("steps", NOT_STATED if steps is None else f"{steps:,}"))
    if facts.tokenizer:
        rows.append(("codes of the tokenizer", facts.tokenizer))
    if "weights" in origin:
        rows.append(("weights", "averaged (EMA)" if origin["weights"] == "ema" else "as trained"))
    if "source" in origin:
        family = FAMILIES.get(origin.get("family", ""))
        rows.append(
            ("converted from", f"`{origin['source']}`" + (f" of {family.title}, {family.home}" if family else ""))
        )
        rows.append(("SHA-256 of that file", f"`{origin.get('source_sha256', NOT_STATED)}`"))
    elif "checkpoint" in origin:
        rows.append(("checkpoint", f"`{origin['checkpoint']}`"))
    return "## Training\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def _figures(records: list[tuple[Path, dict]]) -> str:
    if not records:
        return "## Figures\n\nNone measured.\n"
    text = "## Figures\n\nMeasured with `tools/evaluate.py` on exactly these weights.\n"
    for path, record in records:
        rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in _numbers(record))
        proof = "".join(f"- {name}: {value}\n" for name, value in _provenance(record))
        text += f"\n### {TASKS[record['command']].capitalize()}, {_images_of(record)}\n\n"
        text += f"| figure | measured |\n|---|---|\n{rows}\nFrom `{path.name}`:\n\n{proof}"
    return text


def _provenance(record: Mapping) -> Iterator[tuple[str, str]]:
    """What a record's figures depend on, without the paths of the machine that measured them."""
    for name, value in record["inputs"].items():
        if value is not None:
            yield name, f"`{value}`"
    for name in ("sampler", "seed", "precision", "protocol", "device"):
        if record.get(name) is not None:
            yield name, f"`{json.dumps(record[name])}`"
    git = record.get("git") or {}
    if git.get("revision"):
        yield "code", f"`{git['revision']}`" + (" with edits" if git.get("edited") else "")
    versions = {name: version for name, version in (record.get("versions") or {}).items() if version}
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _images_of(record: Mapping) -> str:
    count = record.get("image_count")
    return f"{count:,} images" if isinstance(count, int) else "images"


def _license(facts: CardFacts) -> str | None:
    family = FAMILIES.get(facts.origin.get("family", ""))
    return facts.license or (family.license if family else None)


def _license_of_origin(facts: CardFacts) -> str:
    family = FAMILIES.get(facts.origin.get("family", ""))
    return f"As stated by the publisher of the weights: {family.home}" if family else NOT_STATED.capitalize()


def _paper(model: nn.Module, facts: CardFacts) -> str:
    """The citation of what the model is; of a quantizer without a paper here, its number."""
    quantizer = model.config.quantizer if isinstance(model, Tokenizer) else IBQConfig()
    if facts.origin.get("family") == "llamagen":
        return f"```bibtex\n{LLAMAGEN_PAPER}```"
    match quantizer:
        case LFQConfig():
            return f"```bibtex\n{OPEN_MAGVIT2_PAPER}```"
        case IBQConfig():
            return f"```bibtex\n{IBQ_PAPER}```"
        case _:
            return f"Quantizer: arXiv {QUANTIZER_PAPERS[quantizer.kind]}"


def _steps_of(origin: Mapping[str, str]) -> int | None:
    text = origin.get("step") or origin.get("checkpoint", "").removeprefix("step-")
    return int(text) if text.isdigit() else None


def _numbers(record: Mapping) -> Iterator[tuple[str, float]]:
    """All figures of a record that are numbers, with names of the whole way."""
    for name, value in evaluation.leaves(record["metrics"]).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, value


def _short(digest: str | None) -> str:
    return NOT_STATED if digest is None else f"{digest[:12]}..."
