"""Options that are the fields of a dataclass, and back."""

import argparse
from dataclasses import fields

import pytest

from ibq.config import UserError
from ibq.sampler import PRECISIONS, SamplerConfig
from launchers.slurm import Resources
from tools.lib.options import add_settings, check_least, settings_of, words_of


def parser_of(kind: type, *names: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_settings(parser, kind, *names)
    return parser


@pytest.mark.parametrize(
    "settings",
    [
        SamplerConfig(),
        SamplerConfig(guidance_interval=(0.25, 0.5), guidance_schedule="interval", top_k=7),
        SamplerConfig(temperature=0.0, rows_per_block=3, precision="bf16"),
    ],
    ids=str,
)
def test_options_give_the_settings_that_they_were_made_of(settings):
    words = words_of(settings)
    assert settings_of(SamplerConfig, parser_of(SamplerConfig).parse_args(words)) == settings
    assert words == [] or settings != SamplerConfig()


def test_options_of_types_that_may_be_missing_or_given_twice():
    parse = parser_of(Resources).parse_args
    assert settings_of(Resources, parse([])) == Resources()
    given = parse(["--cpus-per-gpu", "4", "--sbatch", "a=b", "--sbatch", "c=d", "--partition", "gpu"])
    assert settings_of(Resources, given) == Resources(cpus_per_gpu=4, more=("a=b", "c=d"), partition="gpu")
    assert settings_of(Resources, parse([])).more == (), "a call must not see the options of another"


def test_every_setting_of_the_sampler_has_help():
    text = " ".join(parser_of(SamplerConfig).format_help().split())
    assert all(field.metadata["help"] in text for field in fields(SamplerConfig))
    assert f"--precision {{auto,{','.join(PRECISIONS)}}}" in text and "--rows N" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows: 0 is out of range; use at least 1"),
        (["--guidance-interval", "0.7", "0.2"], "--guidance-interval: 0.7 to 0.2 is no part of the image"),
        (["--precision", "int8"], "--precision: int8 is gone, as it was slower than bf16"),
    ],
)
def test_a_refused_value_names_its_option(words, message):
    with pytest.raises(UserError) as caught:
        settings_of(SamplerConfig, parser_of(SamplerConfig).parse_args(words))
    assert str(caught.value).startswith(message)


def test_a_number_or_a_word(capsys):
    parse = parser_of(SamplerConfig).parse_args
    assert parse(["--rows", "7"]).rows_per_block == 7 and parse(["--rows", "auto"]).rows_per_block == "auto"
    with pytest.raises(SystemExit) as caught:
        parse(["--rows", "many"])
    assert caught.value.code == 2 and "--rows: 'many' is no whole number; give one, or auto" in capsys.readouterr().err


def test_only_some_settings():
    arguments = parser_of(SamplerConfig, "precision").parse_args(["--precision", "bf16"])
    assert vars(arguments) == {"precision": "bf16"}
    assert settings_of(SamplerConfig, arguments) == SamplerConfig(precision="bf16")


def test_least_values():
    check_least(argparse.Namespace(batch_size=1, views=None), batch_size=1, views=1)
    with pytest.raises(UserError, match="--batch-size must be at least 1, got 0"):
        check_least(argparse.Namespace(batch_size=0), batch_size=1)
