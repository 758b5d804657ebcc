"""`iddpm studio`: a local page on runs."""

from iddpm.cli.flags import Parser, Verb
from iddpm.errors import UserError
from iddpm.saying import say
from iddpm.store.remote import place, remote
from iddpm.words import many


def _parser(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", default=["runs"], metavar="run", help="runs, or folders of runs [runs]")
    parser.add_argument("--data", default="", metavar="DIR[,DIR]", help="image folders or archives that the page may train on")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; beyond this machine with a token alone")
    parser.add_argument("--port", type=int, default=8787, metavar="N", help="the port [8787]; 0: a free one, which is told")
    parser.add_argument("--token_file", default="", metavar="FILE", help="a file with the token that every visitor must bring")
    parser.add_flag("open", bool, "open the page in a browser", default=False)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: the best there is")


def _studio(runs: list[str], data: str, host: str, port: int, token_file: str, open: bool, device: str) -> None:
    try:
        import uvicorn  # noqa: F401

        from iddpm.look.serving.listen import listening, serve, token_of
        from iddpm.look.studio.app import make
    except ImportError as e:
        raise UserError(f"iddpm studio needs {e.name}: pip install 'iddpm[studio]'") from None
    from iddpm import build

    build.device(device)  # refused now, where it is none
    token, folders = token_of(host, token_file), [place(run) for run in runs]
    images = [place(part.strip()) for part in data.split(",") if part.strip()]
    for path in (*folders, *images):
        if remote(path):
            raise UserError(f"{path}: the studio looks at folders of this machine alone")
        if not path.exists() and path != place("runs"):
            raise UserError(f"{path} does not exist: give folders of runs, and with --data those of images")
    where, address = listening(host, port)
    app, trainings, works = make(folders, images, device, host, token)
    say(f"the studio: {address}{'/?token=...' if token else ''}   (Ctrl-C ends it)", "serving", address=address)
    if open:
        import webbrowser

        webbrowser.open(address)
    try:
        serve(app, where)
    finally:
        works.close()
        if stopped := trainings.close():
            say(f"stopped, and saved: {', '.join(stopped)} ({many(len(stopped), 'training')}); iddpm train --run DIR goes on")


VERB = Verb(_studio, _parser, "[RUN ...]", "a local page: watch runs, play with their models, train")
