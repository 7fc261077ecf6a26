"""What a sweep has found: one row of figures a run, as CSV, JSON, Markdown, a page and pictures."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ibq.config import load_config
from ibq.files import write_text
from ibq.models.tokenizer import Tokenizer
from ibq.models.tokenizer_config import TokenizerConfig
from ibq.models.transformer import TransformerConfig
from ibq.reports.ablation import COLUMNS, AblationData, cell, columns_of, head, write_ablation
from ibq.reports.figures import as_number
from ibq.scaling.transformer import transformer_flops, transformer_parameters, transformer_weights
from ibq.training.provenance import origin
from ibq.training.stopping import read_status
from launchers.lib.run_config import is_training_script, load_run
from launchers.lib.sweep.grid import PICTURES, Run, SweepConfig
from launchers.lib.sweep.state import MEASURED_FILES, RECORD_FILE
from launchers.lib.sweep.table import aligned

CURVES = {
    "PSNR": "psnr", "SSIM": "ssim", "Codebook usage": "usage", "Codebook perplexity": "perplexity",
    "Validation NLL": "nll",
}  # fmt: skip
RECONSTRUCTION = ("psnr", "ssim", "lpips", "l1", "thumbnail_psnr")
USAGE = ("usage", "perplexity", "effective_rank", "tokens_per_code")


def write_results(config: SweepConfig, runs: Sequence[Run], options: str) -> None:
    """Write and print the figures of all runs that are done; `options` are those of the command that made them."""
    done = [run for run in runs if is_measured(run, config)]
    if not done:
        print("no run is done: there are no results yet")
        return
    folder = config.folder
    rows = {run.name: figures(run) for run in done}
    results = {
        "name": config.name,
        "origin": origin(f"python launchers/sweep.py {options}"),
        "missing": [run.name for run in runs if run not in done],
        "columns": {name: COLUMNS[name][0] for name in columns_of(rows)},
        "runs": [{"run": run.name, "settings": list(run.overrides), **rows[run.name]} for run in done],
    }
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "results.csv", csv_text(results["runs"], list(results["columns"])))
    write_ablation(folder, PICTURES, ablation_data(config, done, results))
    print("\n" + "\n".join(text_table(rows)))
    print(f"\ntable {folder / 'results.csv'}, page {folder / 'report.html'}, for documents {folder / 'results.md'}")


def is_measured(run: Run, config: SweepConfig) -> bool:
    """Whether a run is trained and measured."""
    wanted = MEASURED_FILES if config.evaluation is not None else ()
    trained = read_status(run.folder).get("state") == "finished"
    return trained and all((run.folder / name).exists() for name in wanted)


def figures(run: Run) -> dict[str, float]:
    """A run's row: names as in COLUMNS; what is not finite is left out."""
    row: dict[str, Any] = {}
    if (run.folder / "reconstruction.json").exists():
        reconstruction, usage = (_read(run.folder / f"{name}.json") for name in ("reconstruction", "usage"))
        row |= {"num_codes": reconstruction["num_codes"], "dim": reconstruction["dim"]}
        row |= {name: reconstruction["metrics"].get(name) for name in RECONSTRUCTION}
        row |= {name: usage["metrics"].get(name) for name in USAGE}
        row["parameters"] = parameters(run.folder / "best" / "config.yaml")
    logged = metric_rows(run.folder)
    row |= transformer_figures(run, logged)
    timed = [line["seconds/step"] for line in logged if "seconds/step" in line]
    memory = [line["peak_memory_gib"] for line in logged if "peak_memory_gib" in line]
    row["steps"] = read_status(run.folder).get("step")
    row["seconds_per_step"] = median(timed) if timed else None
    row["seconds"] = _read(run.folder / RECORD_FILE)["parts"].get("train", {}).get("seconds")
    row["peak_memory_gib"] = max(memory, default=None)
    found = {name: as_number(row[name]) for name in COLUMNS if row.get(name) is not None}
    return {name: int(value) if COLUMNS[name][1] == "int" else value for name, value in found.items()
            if np.isfinite(value)}  # fmt: skip


def transformer_figures(run: Run, logged: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a fit of a scaling law needs of a transformer's run; nothing for other runs.

    Tokens are those of all steps, and FLOPs those of forward and backward pass without recomputation; `nll` is that of
    the last validation, with averaged weights, and `train_loss` the mean of the last log interval.
    """
    script, *arguments = run.parts[0].command
    if not is_training_script(script):
        return {}
    config = load_run(script, arguments)
    if not isinstance(config.model, TransformerConfig):
        return {}
    model, batch = config.model, config.training.batch_size
    weights, count = transformer_weights(model), transformer_parameters(model)
    images = batch * int(read_status(run.folder).get("step", 0))
    validations = [as_number(line["validation/nll"]) for line in logged if "validation/nll" in line]
    losses = [line["loss/total"] for line in logged if "loss/total" in line]
    one_grid = validations and len(model.code_grids) == 1
    return {
        "depth": model.depth,
        "width": model.model_width,
        "batch_size": batch,
        "learning_rate": config.optimizer.peak_learning_rate(batch),
        "non_embedding_parameters": count - weights["embeddings"].count - weights["head"].count,
        "parameters": count,
        "tokens": images * model.num_tokens,
        "flops": images * transformer_flops(model).textbook,
        "nll": validations[-1] if validations else None,
        "bits_per_image": validations[-1] * model.num_tokens / math.log(2) if one_grid else None,
        "best_nll": min(validations, default=None),
        "train_loss": losses[-1] if losses else None,
        "held_out": int(run.held_out),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parameters(config_file: Path) -> int:
    """Trained weights of a tokenizer, codebook included."""
    with torch.device("meta"):  # shapes are enough
        tokenizer = Tokenizer(load_config(TokenizerConfig, config_file))
    return sum(parameter.numel() for parameter in tokenizer.parameters())


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The figures with all their digits, and the settings that make each run different."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["run", *columns, "settings"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "settings": " ".join(row["settings"])} for row in rows)
    return file.getvalue()


def text_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The figures for the terminal."""
    columns = columns_of(rows)
    lines = [[name, *(cell(row, column) for column in columns)] for name, row in rows.items()]
    return aligned([["run", *map(head, columns)], *lines], right=range(1, 1 + len(columns)))


def ablation_data(config: SweepConfig, done: Sequence[Run], results: Mapping[str, Any]) -> AblationData:
    """What the page shows."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in done:
        logged = metric_rows(run.folder)
        for title, key in CURVES.items():
            series = [(r["step"], as_number(r[f"validation/{key}"])) for r in logged if f"validation/{key}" in r]
            curves.setdefault(title, {})[run.name] = series
    originals, reconstructions = torch.empty(0), {}
    for run in done:
        if (path := run.folder / "reconstruction.npz").exists() and config.evaluation is not None:
            with np.load(path) as pictures:
                originals = torch.from_numpy(pictures["originals"])[: config.evaluation.pictures]
                shown = torch.from_numpy(pictures["reconstructions"])[: config.evaluation.pictures]
            reconstructions[run.name] = shown
    return AblationData(
        title=config.title or f"Sweep: {config.name}",
        about=config.about,
        rows={row["run"]: row for row in results["runs"]},
        settings={run.name: run.overrides for run in done},
        common=(f"base {config.base}", *config.overrides),
        missing=results["missing"],
        curves=curves,
        originals=originals,
        reconstructions=reconstructions,
        command=results["origin"]["command"],
    )
