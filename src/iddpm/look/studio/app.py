"""The addresses of `iddpm studio`: the page, and what it asks for."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import iddpm
from iddpm import build
from iddpm.errors import UserError, reason
from iddpm.look import report
from iddpm.look.serving.desk import Full
from iddpm.look.serving.guard import guards
from iddpm.look.studio import play
from iddpm.look.studio.shelf import Shelf
from iddpm.look.studio.trainings import Trainings
from iddpm.look.studio.turns import Works

LARGEST = 24 << 20  # bytes of a request: a picture of 16 MB, in base64
LOADS = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; form-action 'none'"
)
FILES = {  # of the page, and what they are
    "": "text/html", "studio.css": "text/css", "studio.js": "text/javascript", "board.js": "text/javascript",
    "page.css": "text/css", "page.js": "text/javascript", "uplot.css": "text/css", "uplot.js": "text/javascript",
}  # fmt: skip


def app(shelf: Shelf, trainings: Trainings, works: Works, device: str, host: str, token: str) -> Starlette:
    """The application: runs of a `shelf`, models on a device, the trainings that are started, and what visitors draw."""

    def page(request: Request) -> Response:
        name = request.path_params.get("name", "")
        if name not in FILES:
            return Response("there is no such file", 404)
        return Response(_file(name), media_type=FILES[name], headers={"cache-control": "no-cache"})

    async def listing(request: Request) -> Any:
        return dict(runs=await run_in_threadpool(shelf.listing), trainings=trainings.listing(), version=iddpm.__version__)

    async def view(request: Request) -> Any:
        return await run_in_threadpool(shelf.view, request.query_params.getlist("run"))

    async def curves(request: Request) -> Any:
        return await run_in_threadpool(shelf.curves, request.query_params.getlist("run"))

    async def model(request: Request) -> Any:
        name = request.query_params.get("run", "")
        return await run_in_threadpool(lambda: play.about(name, shelf.path(name), device))

    async def picture(request: Request) -> Any:
        asked = await _body(request)

        def fit() -> Any:
            config = play.newest(shelf.path(str(asked.get("model"))), device).config
            image, note = play.fitted(str(asked.get("image")), config)
            return dict(image=play.address(image[None]), note=note)

        return await run_in_threadpool(fit)

    async def draw(request: Request) -> Response:
        asked = await _body(request)
        wish = await run_in_threadpool(lambda: play.wish_of(asked, shelf.path, device))
        times = wish.frames if asked["kind"] == "between" else 1
        share = wish.strength if asked["kind"] == "edit" else 1
        steps = max(1, round(build.grid(wish.config).steps * share)) * times
        events = works.start(steps, lambda watch: play.work(wish, watch))
        return StreamingResponse(_lines(events), media_type="application/x-ndjson")

    async def offered(request: Request) -> Any:
        return trainings.offered()

    async def train(request: Request) -> Any:
        asked = await _body(request)
        action, name = asked.pop("action", ""), str(asked.get("run", ""))
        if action == "begin":
            name = trainings.begin(asked)
            shelf.begun.append(trainings.home / name)
            return dict(run=name)
        if action == "stop":
            trainings.stop(name)
        elif action == "resume":
            trainings.resume(name, shelf.path(name))
        elif action == "finish":
            trainings.finish(name, shelf.path(name), str(asked.get("time", "")))
        else:
            raise UserError("action is one of: begin, stop, resume, finish")
        return dict(run=name)

    routes = [Route("/", page), Route("/files/{name}", page)]
    routes += [Route(f"/api/{f.__name__}", _answered(f)) for f in (listing, view, curves, model, offered)]
    routes += [Route(f"/api/{f.__name__}", _answered(f), methods=["POST"]) for f in (picture, draw, train)]
    return Starlette(routes=routes, middleware=guards(host, token, LARGEST, LOADS))


class Answer(JSONResponse):
    """Strict JSON, whatever lies in a run: what is not finite is null, and letters of odd file names are escaped."""

    def render(self, content: Any) -> bytes:
        text = json.dumps(content)
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(json.loads(text, parse_constant=lambda name: None))
        return text.encode()


def _answered(answer: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    """What answers with JSON, or with a sentence on what is wrong."""

    async def asked(request: Request) -> Response:
        try:
            found = await answer(request)
            return found if isinstance(found, Response) else Answer(found)
        except ClientDisconnect:
            return JSONResponse({"error": f"more than {LARGEST >> 20} MB: take a smaller picture"}, 413)
        except Full:
            return JSONResponse({"error": "others are drawing: try again in a moment"}, 429, {"retry-after": "5"})
        except (UserError, OSError) as e:
            return Answer({"error": reason(e)}, 400)

    return asked


async def _body(request: Request) -> dict[str, Any]:
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError) as e:
        raise UserError(f"the request is no JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError("send an object of JSON")
    return found


async def _lines(events: AsyncIterator[Any]) -> AsyncIterator[str]:
    async for event in events:
        yield json.dumps(event) + "\n"


def _file(name: str) -> str:
    """A file of the page; those of the report are its own."""
    own = resources.files("iddpm.look.studio") / "page" / (name or "studio.html")
    return own.read_text("utf-8") if own.is_file() else report.asset(name)


def make(runs: Sequence[Path], data: Sequence[Path], device: str, host: str, token: str) -> tuple[Starlette, Trainings, Works]:
    """The application on some folders of runs, new ones going to the first; its trainings and works are to be closed."""
    home = next((path for path in runs if not (path / "config.json").exists()), runs[0].parent)
    trainings, works = Trainings(home, data, device), Works()
    return app(Shelf(runs), trainings, works, device, host, token), trainings, works
