"""A page to try a trained model: drop a picture and see its reconstruction and codes, or generate images row by row.

python tools/demo.py                                                     # what tools/quickstart.sh has trained
python tools/demo.py --tokenizer runs/tokenizer_16384                    # only reconstructions
python tools/demo.py --tokenizer runs/tokenizer_16384 --transformer runs/ar_b --precision bf16
"""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error
from ibq.sampler import SamplerConfig
from tools.lib import ROOT
from tools.lib.options import add_device_option, add_settings

# PyTorch and Gradio are imported where they are needed: --help and mistakes in the options should not wait for them.

EXAMPLES = "tests/data/emoji64/val-*.tar"
FIRST_PORT, PORTS = 7860, 100
EPILOG = """\
Needs Gradio: python -m pip install -e '.[demo]'

The page is for whoever can reach --host: by default only this machine, on the first free port from 7860. To use it from
another one, forward the port (ssh -L 7860:127.0.0.1:7860 MACHINE) rather than opening the page to a network: it has no
password. It keeps nothing and asks nothing of the internet: no telemetry, no share link, no fonts from elsewhere;
uploads lie in a temporary folder until Ctrl-C. One request is served at a time, the others wait in a queue.

The same settings and seed give the same images as tools/sample.py, whose command the page shows.
"""
# Gradio looks at these when it is imported.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}
# What Gradio's page may load: nothing but what comes from here. Its own scripts are written into the page.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; frame-ancestors 'self'"
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]
SHUTDOWN_S = 1  # for requests under way, after Ctrl-C


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokenizer", help="run folder, its `best` folder, or a published .ckpt file (default: the quickstart's)")
    add("--transformer", help="the same for the transformer; without it the page only reconstructs")
    add("--class-names", type=Path, metavar="FILE", help="JSON list (default: classes.json or the data of the run)")
    add("--images", default=EXAMPLES, help="pictures to try, tar shards or a folder (default: the bundled emoji)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--port", type=int, help=f"port to listen on (default: the first free one from {FIRST_PORT}; 0: any)")
    add_settings(parser, SamplerConfig, "rows_per_block", "precision")
    add_device_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(prefix="ibq-demo-") as folder, listening(arguments) as listener:
        os.environ.update(QUIET, GRADIO_TEMP_DIR=folder)
        require_gradio()
        from ibq.training.run import set_up_torch
        from tools.lib.demo import page as demo_page
        from tools.lib.demo.models import open_models

        set_up_torch(training=False)
        models = open_models(arguments)
        page = demo_page.build(models, examples(arguments.images, Path(folder)))
        serve(page, demo_page, listener, arguments.host)


def require_gradio() -> None:
    """UserError if it is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"the page needs Gradio: python -m pip install -e '.[demo]' ({error})") from error


def listening(arguments: argparse.Namespace) -> socket.socket:
    """A socket on the host and port of the options, taken before anything slow; UserError if it cannot be had."""
    host, port = arguments.host, arguments.port
    if port is not None and not 0 <= port <= 65_535:
        raise UserError(f"--port: {port} is out of range; use 0 (any) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: no address of this machine ({error.strerror})") from error
    for candidate in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS):
        listener = socket.socket(family, kind)
        # Not from one that listens: from one just closed.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address[0], candidate, *address[2:]))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            problem = error.strerror
    if port is not None:
        raise UserError(f"--port {port}: cannot be had on {host} ({problem}); give another, or none to take a free one")
    raise UserError(
        f"--host {host}: no free port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} ({problem}); give --port"
    )


def examples(place: str, folder: Path) -> Callable[[], Path | None] | None:
    """A function that writes another picture of `place` to `folder` each time; None if there are no pictures."""
    from ibq.data.shards import open_images
    from ibq.data.storage import ShardStore

    try:
        index = open_images(place if place != EXAMPLES else str(ROOT / place))
    except UserError:
        if place != EXAMPLES:
            raise
        return None  # the bundled pictures are not everywhere where the code is
    store, turn = ShardStore(checks=index.checks), iter(range(2**62))

    def another() -> Path:
        number = next(turn) * 37 % len(index)  # neighbours in a shard look alike
        path = folder / f"example-{number}.png"
        path.write_bytes(store.read(index[number]))
        return path

    return another


def serve(page, demo_page, listener: socket.socket, host: str) -> None:
    """Answer requests until a signal comes; KeyboardInterrupt after Ctrl-C."""
    import fastapi
    import gradio
    import uvicorn

    application = gradio.mount_gradio_app(
        guarded(fastapi.FastAPI(openapi_url=None), listener),
        page,
        path="/",
        theme=demo_page.theme(),
        css=demo_page.CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        max_file_size=f"{demo_page.views.UPLOAD_MB}mb",
    )
    sys.addaudithook(stay_here)
    config = uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=SHUTDOWN_S)
    shown = f"[{host}]" if ":" in host else host
    if not is_loopback(listener):
        print("WARNING: whoever reaches this address can use the page: it has no password", file=sys.stderr)
    print(f"http://{shown}:{listener.getsockname()[1]}  (Ctrl-C stops)", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def stay_here(event: str, arguments: tuple) -> None:
    """An audit hook: PermissionError where this process would look up or connect to another machine.

    Gradio would, for a request that names a picture by its URL.
    """
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and host != "localhost" and not host.startswith("127.") and host != "::1":
        raise PermissionError(f"{host}: the page asks nothing of other machines")


def guarded(application, listener: socket.socket):
    """Headers that keep the browser here, and no answers to names that are not this machine's."""
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    application.add_middleware(PolicyMiddleware)
    if is_loopback(listener):  # a site elsewhere may point its name here (DNS rebinding)
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)
    return application


class PolicyMiddleware:
    """Adds POLICY to every answer, also to those that are streams."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):  # noqa: D102 (ASGI)
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    address = listener.getsockname()[0]
    return address.startswith("127.") or address == "::1"


if __name__ == "__main__":
    exit_on_user_error(main)
