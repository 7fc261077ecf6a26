"""The tab of tools/demo.py that draws a part of a picture anew: which picture, which part, and what a click does."""

from collections.abc import Callable, Iterator, Mapping

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from ibq.config import UserError
from ibq.data.transforms import square
from ibq.editing import Edit
from ibq.models.transformer import Grid
from ibq.pixels import codes_of, decode_in_blocks
from tools.lib.demo import views as views
from tools.lib.demo.models import Models

PARTS = ("the box", "all around it")
QUIET = {"api_visibility": "private", "show_progress": "minimal"}
RANDOM = (
    "What is drawn fits all that is kept. A transformer whose training was annealed to raster order, as RAR's, has "
    "forgotten other orders to a degree: `yaml/README.md`, Random order, says how to train one for this."
)
RASTER = (
    "This transformer knows raster order alone: it can only draw the lower part of a picture, over all columns. One "
    "that was trained with `order: random` draws any part: `yaml/README.md`, Random order."
)


def editing_tab(
    models: Models, grids: Mapping[str, Grid | None], settings: list, last: gr.State, generate: Callable, **queue
) -> None:
    """A picture, a part of it, and that part drawn anew with the settings of the other tab.

    `settings` are its components, the last a name of `grids`; `last` the codes [n, h, w] that it has drawn, and
    `generate` what its button does with values of the settings and an edit.
    """
    config = models.transformer.config
    rows, columns = config.positions
    gr.Markdown(RANDOM if config.order == "random" else RASTER)
    given = gr.State()
    with gr.Row():
        with gr.Column():
            upload = gr.File(
                label=f"A picture, {views.LARGEST}", elem_id="edit-upload", file_types=["image"], height=140
            )
            with gr.Row():
                number = gr.Number(1, label="Or one drawn last", precision=0, minimum=1, elem_id="edit-number")
                take = gr.Button("Take it", elem_id="edit-take", min_width=80)
            box = list(_box(rows, columns, whole=config.order == "raster"))
            part = gr.Radio([*PARTS], value=PARTS[0], label="What is drawn anew", elem_id="edit-part")
            start = gr.Button("Draw anew", variant="primary", elem_id="edit-draw")
            gr.Markdown("Class, seed, images and sampler as in the tab Generate.")
        with gr.Column():
            look = {"format": "png", "interactive": False}
            picture = gr.Image(label="Kept", elem_id="edit-picture", height=280, buttons=["fullscreen"], **look)
            both = ["download", "fullscreen"]
            drawn = gr.Image(label="Drawn anew", elem_id="edit-samples", buttons=both, **look)
            message = gr.Markdown(elem_id="edit-message")
    region, shown = [*box, part], [given, picture, message]
    grid = settings[-1]
    upload.upload(opener(models, grids), [upload, grid, *region], shown, **QUIET, **queue)
    take.click(taker(models), [last, number, *region], shown, **QUIET, **queue)
    gr.on([each.change for each in region], shower(models), [given, *region], picture, **QUIET, **queue)
    start.click(drawer(generate), [given, *region, *settings], [drawn, message, last], **QUIET, **queue)


def _box(rows: int, columns: int, *, whole: bool) -> Iterator[gr.Slider]:
    """Sliders of the first and last row and column of tokens, counted from 1; `whole`: all from the middle row on."""
    inner = [(rows // 4 + 1, rows - rows // 4), (columns // 4 + 1, columns - columns // 4)]
    values = [(rows // 2 + 1, rows), (1, columns)] if whole else inner
    for name, most, ends in zip(("row", "column"), (rows, columns), values, strict=True):
        with gr.Row():
            for end, value in zip(("First", "Last"), ends, strict=True):
                name_of = f"edit-{end.lower()}-{name}"
                yield gr.Slider(
                    1, most, value=min(value, most), step=1, label=f"{end} {name} of codes", elem_id=name_of
                )


# --- What the clicks do ---


def opener(models: Models, grids: Mapping[str, Grid | None]) -> Callable:
    """(file, grid, region) -> codes [h, w], the picture without what is drawn anew, message."""

    def show(file: str | None, grid: str, *region) -> tuple:
        if file is None:
            return None, None, ""
        try:
            pixels = views.read_picture(file)
        except UserError as error:
            return None, None, views.escaped(str(error))
        height, width = grids.get(grid) or models.transformer.config.code_grids[0]
        size = (height * models.tokenizer.downsampling, width * models.tokenizer.downsampling)
        fitted = torch.from_numpy(square(Image.fromarray(pixels), size).copy()).permute(2, 0, 1)
        codes = codes_of(models.tokenizer, fitted[None])[0]
        return codes, kept(models, codes, *region), ""

    return show


def taker(models: Models) -> Callable:
    """(codes drawn last, which of them, region) -> the same."""

    def show(last: Tensor | None, number: int | None, *region) -> tuple:
        if last is None or not 1 <= (number or 0) <= len(last):
            return None, None, "There is no such picture: draw some in the tab Generate first."
        return last[number - 1], kept(models, last[number - 1], *region), ""

    return show


def shower(models: Models) -> Callable:
    """(codes, region) -> the picture without what is drawn anew."""
    return lambda given, *region: None if given is None else kept(models, given, *region)


def drawer(generate: Callable) -> Callable:
    """(codes, region, settings) -> (pictures, message, codes) after every row's number of codes."""

    def show(given: Tensor | None, first_row, last_row, first_column, last_column, part, *settings):
        if given is None:
            yield None, "There is no picture yet: give one, or take one of those drawn last.", gr.skip()
            return
        keep = keep_of(given, first_row, last_row, first_column, last_column, part)
        if keep.all():
            yield None, "There is no code in the box: its first row and column must not be beyond the last.", gr.skip()
            return
        *others, _ = settings  # the grid is that of the picture
        yield from generate(*others, "", edit=Edit(codes=given, keep=keep))

    return show


def keep_of(codes: Tensor, first_row, last_row, first_column, last_column, part: str) -> Tensor:
    """bool [h, w] of the codes that stay, by the box's first and last row and column from 1."""
    inside = torch.zeros(codes.shape, dtype=torch.bool)
    inside[int(first_row) - 1 : int(last_row), int(first_column) - 1 : int(last_column)] = True
    return ~inside if part == PARTS[0] else inside


def kept(models: Models, codes: Tensor, *region):
    """The picture of codes [h, w], grey where they are drawn anew."""
    with models.autocast():
        image = decode_in_blocks(models.tokenizer, codes[None], block=1)[0]
    stays = keep_of(codes, *region)
    for axis in (0, 1):
        stays = stays.repeat_interleave(models.tokenizer.downsampling, axis)
    return views.enlarged(torch.where(stays, image, views.GREY).byte())
