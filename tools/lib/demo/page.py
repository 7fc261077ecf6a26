"""The page of tools/demo.py: what stands where, and what a click does."""

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr

from ibq.config import UserError
from ibq.editing import Edit
from ibq.models.transformer import Grid
from ibq.pixels import decode_in_blocks
from ibq.sampler import SamplerConfig
from ibq.sampling import sample_rows
from tools.lib.demo import views as views
from tools.lib.demo.edit import editing_tab
from tools.lib.demo.models import Models
from tools.lib.options import words_of

# Values that the quickstart's samples are drawn with.
GUIDANCE, TOP_P, IMAGES = 2.5, 0.9, 4
LARGEST_SIDE = 512  # pixels of a picture to reconstruct, unless the tokenizer was trained on larger ones
PATIENCE_S = 1.0  # a picture that takes longer than this is not made after every row
MOST_WAITING = 20  # requests in the queue
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
CSS = """
.gradio-container { width: 100% !important; max-width: 1100px !important; margin: auto !important; }
img { image-rendering: pixelated; }
table.codes, table.codes tr { border: none !important; border-collapse: collapse; font-size: 0.9em; }
table.codes td, table.codes th { padding: 0.1em 0.8em 0.1em 0; text-align: right; border: none !important; }
table.codes .swatch { display: inline-block; width: 1em; height: 1em; vertical-align: middle; }
table.codes .bar { height: 0.9em; min-width: 1px; } table.codes td:last-child { width: 14em; }
#generate-message code { white-space: pre-wrap !important; }
"""
# A stack of the machine's own fonts: Gradio's themes take theirs from Google.
FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
MONOSPACE = ["ui-monospace", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's default looks, with fonts that are there."""
    return gr.themes.Default(font=FONTS, font_mono=MONOSPACE)


def build(models: Models, example: Callable[[], Path | None] | None = None) -> gr.Blocks:
    """The page; `example` gives another picture to try each time."""
    with gr.Blocks(title="ibq", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(_headline(models))
        with gr.Tabs():
            with gr.Tab("Reconstruct", elem_id="reconstruct-tab"):
                reconstruction_tab(models, example)
            if models.transformer is not None:
                with gr.Tab("Generate", elem_id="generate-tab"):
                    settings, last = generation_tab(models)
                with gr.Tab("Edit", elem_id="edit-tab"):
                    editing_tab(models, grids_of(models), settings, last, generator(models), **ONE_AT_A_TIME)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def _headline(models: Models) -> str:
    quantizer = models.tokenizer.quantizer
    text = f"### ibq · {quantizer.num_codes:,} codes of {quantizer.dim} dimensions"
    if models.transformer is None:
        return f"{text}\nNo transformer: to generate images, start the page with `--transformer` as well."
    return f"{text} · transformer of {' or '.join(grids_of(models))} tokens"


def grids_of(models: Models) -> dict[str, Grid | None]:
    """What is shown -> the grid of codes that the transformer knows; the first, which is drawn anyway, is None."""
    grids = models.transformer.config.code_grids
    return {f"{height} x {width}": (height, width) if number else None for number, (height, width) in enumerate(grids)}


# --- Reconstruction ---


def reconstruction_tab(models: Models, example: Callable[[], Path | None] | None) -> None:
    """A picture, what the tokenizer makes of it, and the codes."""
    config = models.tokenizer.config
    with gr.Row():
        upload = gr.File(label=f"A picture, {views.LARGEST}", elem_id="upload", file_types=["image"], height=140)
        with gr.Column():
            shape = gr.Radio([*views.SHAPES], value=views.SHAPES[0], label="What of it", elem_id="shape")
            side = gr.Slider(
                min(2 * config.downsampling, config.resolution),
                largest_side(models),
                value=config.resolution,
                step=config.downsampling,
                label=f"Longer side in pixels (trained at {config.resolution})",
                elem_id="side",
            )
            another = gr.Button("A bundled picture", elem_id="example", visible=example is not None)
    message = gr.Markdown(elem_id="reconstruct-message")
    with gr.Row():
        pictures = [
            gr.Image(
                label=label,
                format="png",
                interactive=False,
                elem_id=name,
                height=280,
                min_width=120,
                buttons=["fullscreen"],
            )
            for name, label in (
                ("original", "Input"),
                ("reconstruction", "Reconstruction"),
                ("error", f"Difference x {views.ERROR_GAIN}"),
                ("code-map", "Codes"),
            )
        ]
    table = gr.HTML(elem_id="codes")
    gr.on(
        [upload.change, shape.input, side.change],
        reconstructor(models),
        [upload, shape, side],
        [message, *pictures, table],
        show_progress="minimal",
        trigger_mode="always_last",  # while the slider moves
        api_visibility="private",
        **ONE_AT_A_TIME,
    )
    if example is not None:
        another.click(lambda: _as_text(example()), None, upload, api_visibility="private", show_progress="hidden")


def largest_side(models: Models) -> int:
    """In pixels, of a picture to reconstruct: a multiple of the tokenizer's downsampling."""
    config = models.tokenizer.config
    return max(LARGEST_SIDE // config.downsampling * config.downsampling, config.resolution)


def reconstructor(models: Models) -> Callable:
    """(file, shape, side) -> message, four pictures, table of codes."""
    colours = views.code_colours(models.tokenizer.quantizer)

    def show(file: str | None, shape: str, side: int) -> list:
        empty = [None] * 4
        if file is None:
            return ["", *empty, ""]
        try:
            pixels = views.read_picture(file)
            side = min(int(side), largest_side(models))
            fitted = views.fitted(pixels, shape, side, models.tokenizer.config.downsampling)
            with models.autocast():
                made = views.reconstruct(models.tokenizer, fitted)
        except UserError as error:
            return [views.escaped(str(error)), *empty, ""]
        except (RuntimeError, MemoryError) as error:  # out of memory, above all
            return [f"That did not work: {views.escaped(_short(error))}. Try a smaller side.", *empty, ""]
        code_map = colours(made.codes).permute(2, 0, 1)
        shown = [views.enlarged(picture) for picture in (made.original, made.result, made.error, code_map)]
        return [views.figures(made), *shown, views.code_table(made, colours)]

    return show


# --- Generation ---


def generation_tab(models: Models) -> tuple[list, gr.State]:
    """Settings, and images that appear row by row; the settings' components, and where the codes drawn last are."""
    config, most = models.transformer.config, models.defaults.rows_per_block
    choices, grids = views.class_choices(models.names, config.num_classes), [*grids_of(models)]
    with gr.Row():
        with gr.Column(scale=1):
            label = gr.Dropdown(choices, value=0, label="Class", elem_id="class")
            shown = len(grids) > 1
            grid = gr.Dropdown(grids, value=grids[0], label="Rows x columns of codes", elem_id="grid", visible=shown)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            count = gr.Slider(1, most, value=min(IMAGES, most), step=1, label="Images", elem_id="count")
            guidance = gr.Slider(1, 10, value=GUIDANCE, step=0.1, label="Guidance (1: off)", elem_id="guidance")
            temperature = gr.Slider(0, 2, value=1, step=0.05, label="Temperature (0: greedy)", elem_id="temperature")
            filters = {"visible": max(config.digits) > 2}  # of codes; bits have none
            top_k = gr.Slider(0, config.vocab_size, value=0, step=1, label="Top-k (0: off)", elem_id="top-k", **filters)
            usual = TOP_P if filters["visible"] else 1
            top_p = gr.Slider(0, 1, value=usual, step=0.01, label="Top-p (1: off)", elem_id="top-p", **filters)
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=80)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
        with gr.Column(scale=2):
            picture = gr.Image(
                label="Samples", format="png", interactive=False, elem_id="samples", buttons=["download", "fullscreen"]
            )
            message = gr.Markdown(elem_id="generate-message")
    settings, last = [label, count, seed, guidance, temperature, top_k, top_p, grid], gr.State()
    event = start.click(
        generator(models),
        settings,
        [picture, message, last],
        show_progress="minimal",
        show_progress_on=message,  # the picture should stay in sight
        api_visibility="private",
        **ONE_AT_A_TIME,
    )
    stop.click(lambda: "Stopped.", None, message, cancels=[event], queue=False, api_visibility="private")
    return settings, last


def generator(models: Models) -> Callable:
    """(class, images, seed, guidance, temperature, top-k, top-p, grid) -> (picture, message, codes) after every row.

    Codes [n, h, w] come with the last one. With an `edit`, what it keeps is in the picture from the beginning.
    """

    def show(*values, edit: Edit | None = None):
        if None in values:
            yield None, "These settings do not work: a field is empty.", gr.skip()
            return
        try:
            yield from _grow(models, *values, edit=edit)
        except ValueError as error:
            yield None, views.escaped(f"These settings do not work: {error}."), gr.skip()
        except (RuntimeError, MemoryError) as error:
            advice = "Try fewer images, or start the page with less --rows."
            yield None, f"That did not work: {views.escaped(_short(error))}. {advice}", gr.skip()

    return show


def _grow(
    models: Models, label, count, seed, guidance, temperature, top_k, top_p, grid="", edit: Edit | None = None
) -> Iterator[tuple]:
    settings = {"guidance_scale": float(guidance), "temperature": float(temperature)}
    settings |= {"top_k": int(top_k), "top_p": float(top_p), "grid": grids_of(models).get(grid)}
    sampler = replace(models.defaults, **settings)
    sampler = sampler if edit is None else edit.fitted(sampler, models.transformer.config, int(count))
    decoder = models.decoder(sampler)
    count, seed, side = int(count), int(seed), (sampler.grid or decoder.config.code_grids[0])[0]
    started, decoding = time.monotonic(), 0.0
    grown = sample_rows(decoder, [int(label)] * count, range(seed, seed + count), sampler, edit)
    for rows, codes in enumerate(grown, start=1):
        drawing = time.monotonic() - started - decoding
        if rows == side:
            break
        if decoding <= max(drawing, PATIENCE_S * rows):  # slow decoders must not make up most of the time
            begun = time.monotonic()
            with models.autocast():
                images = views.unfinished(models.tokenizer, codes, side)
            decoding += time.monotonic() - begun
            yield views.sheet(images), f"Row {rows} of {side} …", gr.skip()
        else:
            yield gr.skip(), f"Row {rows} of {side} …", gr.skip()
    with models.autocast():
        images = decode_in_blocks(models.tokenizer, codes)
    seconds = time.monotonic() - started
    how = _command(models, label, count, seed, sampler) if edit is None else "Image i is drawn with seed + i."
    yield views.sheet(images), f"Row {side} of {side}: done in {seconds:.1f} s. {how}", codes


def _command(models: Models, label: int, count: int, seed: int, sampler: SamplerConfig) -> str:
    """How to draw the same images without the page, as Markdown."""
    words = ["python", "tools/sample.py", "--tokenizer", models.paths[0], "--transformer", models.paths[1]]
    words += ["--classes", str(label), "--count", str(count), "--seed", str(seed), "--output", "samples"]
    if label == models.transformer.null_class:
        return "Image i is drawn with seed + i."
    command = shlex.join([*words, *words_of(sampler)])
    return f"Image i is drawn with seed + i. The same by command:\n```\n{command}\n```"


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)
