"""`iddpm serve`: draw for others over HTTP."""

from typing import Any

from iddpm.cli.flags import Parser, Verb
from iddpm.config import Sample, Which, make, settings_of
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.store.remote import place


def _parser(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="run", help="a run's folder, a checkpoint or a .safetensors file; several")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; beyond this machine with a token alone")
    parser.add_argument("--port", type=int, default=8765, metavar="N", help="the port [8765]; 0: a free one, which is told")
    parser.add_argument("--token_file", default="", metavar="FILE", help="a file with the token that every request must bring")
    parser.add_argument("--max_images", type=int, default=64, metavar="N", help="images that one request may ask for [64]")
    parser.add_argument("--max_waiting", type=int, default=1024, metavar="N", help="images that may wait, of all requests [1024]")
    parser.add_fields(Sample, "How to draw, where a request does not say", inherited=True)
    parser.add_fields(Which)


def _serve(
    runs: list[str], host: str, port: int, token_file: str, max_images: int, max_waiting: int, **given: Any
) -> None:  # fmt: skip
    which = make(Which, given)
    if min(max_images, max_waiting) < 1:
        raise UserError("--max_images and --max_waiting are 1 or more")
    try:
        import uvicorn  # noqa: F401

        from iddpm.look.serving.app import app, named
        from iddpm.look.serving.desk import Desk
        from iddpm.look.serving.listen import listening, serve, token_of
    except ImportError as e:
        raise UserError(f"iddpm serve needs {e.name}: pip install 'iddpm[studio]'") from None
    from iddpm.sampling.open import open_weights

    token = token_of(host, token_file)
    paths = [place(run) for run in runs]
    changes = {name: value for name, value in given.items() if name in settings_of(Sample)}
    models = named(paths, [open_weights(path, which, changes) for path in paths])
    where, address = listening(host, port)
    desk = Desk(which.batch_size, max_waiting)
    say(f"serving {', '.join(models)} at {address}: POST /samples, GET /health, /metrics", "serving", address=address)
    try:
        serve(app(models, desk, max_images, host, token), where)
    finally:
        desk.close()


VERB = Verb(_serve, _parser, "RUN [RUN ...]", "draw for others over HTTP: JSON in, PNG, npz or zip out")
