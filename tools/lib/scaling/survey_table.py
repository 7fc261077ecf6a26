"""How proposals for machines of several kinds are shown: a table for people, JSON for programs."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from ibq.scaling.hardware import GIB
from ibq.scaling.layouts import Training
from ibq.scaling.plan import Machine, Stage
from ibq.scaling.survey import LEAST, Proposal
from tools.lib.scaling.plan_table import WIDTH, engine_settings, money, price_note

HEAD = f"{'GPUs':14s} {'engine':34s} {'at once':>7s}  {'recomputes':14s} {'GiB':>6s} {'images/s':>9s} {'tokens/s':>10s}"
HEAD += f" {'days':>7s} {'USD':>8s}"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What to take on several machines."""

    source: str  # the config file
    stage: Stage
    training: Training
    steps: int
    priced: bool  # whether the user gave a price
    machines: Sequence[Machine]
    proposals: Sequence[Proposal | None]  # of each machine

    def days(self, proposal: Proposal) -> float:
        """Of the whole run."""
        return proposal.seconds * self.steps / 86400

    def images_per_second(self, proposal: Proposal) -> float:
        """Of all GPUs together."""
        return self.training.batch_size / proposal.seconds


def survey_as_text(survey: Survey) -> str:
    """The table, the settings of every row, and what all of it rests on."""
    training, both = survey.training, list(zip(survey.machines, survey.proposals, strict=True))
    head = f"{survey.source}: {training.precision}, batch {training.batch_size}, {survey.steps:,} steps"
    table = [HEAD, *(_row(survey, machine, proposal) for machine, proposal in both)]
    fitting = [(machine, proposal) for machine, proposal in both if proposal is not None and proposal.fits]
    chosen = [f"{_name(machine):14s} {survey_settings(proposal)}" for machine, proposal in fitting]
    tables = ["\n".join(table), "\n".join(["settings", *chosen])] if chosen else ["\n".join(table)]
    return "\n\n".join([head, *tables, _notes(survey)])


def _name(machine: Machine) -> str:
    return f"{machine.gpus} x {machine.gpu.name}"


def _row(survey: Survey, machine: Machine, proposal: Proposal | None) -> str:
    if proposal is None:
        return f"{_name(machine):14s} the batch of {survey.training.batch_size} does not divide by {machine.gpus}"
    if not proposal.fits:
        more = (proposal.needed - machine.usable) / GIB
        return (
            f"{_name(machine):14s} nothing fits: even {proposal.layout.name} with one image at a time, which "
            f"recomputes {proposal.recomputation}, lacks {more:.1f} GiB a GPU"
        )
    rate = survey.images_per_second(proposal)
    days = survey.days(proposal)
    cost = money(machine, days)
    return (
        f"{_name(machine):14s} {proposal.layout.name:34s} {proposal.micro_batch:>7d}  {proposal.recomputation:14s} "
        f"{proposal.needed / GIB:6.1f} {rate:9,.0f} {rate * survey.stage.num_tokens:10,.0f} {days:7,.1f} "
        f"{'?' if cost is None else f'{cost:,.0f}':>8s}"
    )


def survey_settings(proposal: Proposal) -> str:
    """The settings that make a run do so."""
    config = proposal.stage.config
    own = [f"model.gradient_checkpointing={str(config.gradient_checkpointing).lower()}"]
    own += ["model.checkpoint_selective=true"] if config.checkpoint_selective else []
    return " ".join([engine_settings(proposal.layout, proposal.micro_batch), *own])


def _notes(survey: Survey) -> str:
    machine = survey.machines[0]
    paragraphs = [
        f"An estimate: all FLOPs at {machine.mfu:.0%} of the GPU's dense bf16 rate (--mfu). Unless given, that is what "
        "one H100 reached with this stage; other kinds are taken to reach the same, and a small micro-batch as much as "
        f"a large one: fewer than {LEAST} images at once are proposed only where no more fit. Steps alone: no "
        f"validation, no waiting for data. {machine.reserve / GIB:g} GiB of a GPU stay free (--reserve-gib); what is "
        "offloaded, an optimizer of 16 bytes a parameter, is taken to find room. At once: images per GPU, "
        "training.micro_batch; GiB: what these need.",
        price_note([machine.gpu for machine in survey.machines], survey.priced),
        "All layouts of one machine, and where their time goes: --gpus 8 --gpu h100.",
    ]
    return "\n".join(textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs)


def survey_as_json(survey: Survey) -> str:
    """Everything; memory in bytes."""
    content = {
        "training": {name: value for name, value in vars(survey.training).items() if name != "micro_batch"},
        "steps": survey.steps,
        "tokens_per_image": survey.stage.num_tokens,
        "mfu": survey.machines[0].mfu,
        "machines": [_json(survey, *pair) for pair in zip(survey.machines, survey.proposals, strict=True)],
    }
    return json.dumps(content, indent=1) + "\n"


def _json(survey: Survey, machine: Machine, proposal: Proposal | None) -> dict:
    result = {"gpu": vars(machine.gpu), "gpus": machine.gpus, "usable_bytes": machine.usable, "fits": False}
    if proposal is None:
        return result | {"missing": "the batch does not divide"}
    result |= {"layout": proposal.layout.name, "recomputes": proposal.recomputation, "memory_bytes": proposal.needed}
    if not proposal.fits:
        return result | {"missing_bytes": proposal.needed - machine.usable}
    days, rate = survey.days(proposal), survey.images_per_second(proposal)
    return result | {
        "fits": True,
        "micro_batch": proposal.micro_batch,
        "settings": survey_settings(proposal),
        "seconds_per_step": proposal.seconds,
        "images_per_second": rate,
        "tokens_per_second": rate * survey.stage.num_tokens,
        "days": days,
        "usd": money(machine, days),
    }
