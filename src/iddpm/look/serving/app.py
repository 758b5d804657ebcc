"""The addresses of `iddpm serve`: POST /samples, /health, /metrics."""

import asyncio
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from iddpm.config import seed_list
from iddpm.errors import UserError
from iddpm.look.serving.asked import HOW, checked, configured
from iddpm.look.serving.desk import Desk, Full, Order
from iddpm.look.serving.guard import guards
from iddpm.records import once
from iddpm.sampling import sheets
from iddpm.sampling.job import job
from iddpm.sampling.open import Opened

PLACES = "POST /samples, GET /health and GET /metrics"
OWN = {"model": str, "num_samples": int, "seeds": str, "labels": str, "format": str}  # of a request, beside the solver's settings


def app(models: Mapping[str, Opened], desk: Desk, most: int, host: str, token: str) -> Starlette:
    """The application; `models` by name, of whose images a request may ask for `most`."""
    answered: Counter[int] = Counter()
    most = min(most, desk.most)  # more would be told forever to ask again later

    async def samples(request: Request) -> Response:
        try:
            asked = json.loads(await request.body(), object_pairs_hook=once)
            order, form = _order(asked, models, most)
            images = await asyncio.wrap_future(desk.take(order))
            found: Response = FORMS[form](images, order)
        except ClientDisconnect:
            found = JSONResponse({"error": "the request is too large, or was broken off"}, 413)
        except (ValueError, RecursionError) as e:  # a UserError is a ValueError
            found = JSONResponse({"error": str(e) if isinstance(e, UserError) else f"the body is no JSON: {e}"}, 400)
        except Full:
            found = JSONResponse({"error": "too much is waiting: ask again later"}, 429, {"retry-after": "5"})
        except asyncio.CancelledError:
            found = JSONResponse({"error": "the server is ending"}, 503)
        answered[found.status_code] += 1
        return found

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "models": list(models), "waiting": desk.waiting})

    async def metrics(request: Request) -> Response:
        lines = [
            "# TYPE iddpm_requests_total counter",
            *(f'iddpm_requests_total{{code="{code}"}} {n}' for code, n in sorted(answered.items())),
            "# TYPE iddpm_images_total counter", f"iddpm_images_total {desk.drawn}",
            "# TYPE iddpm_drawing_seconds_total counter", f"iddpm_drawing_seconds_total {desk.seconds:.6f}",
            "# TYPE iddpm_waiting_images gauge", f"iddpm_waiting_images {desk.waiting}",
        ]  # fmt: skip
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    routes = [Route("/samples", samples, methods=["POST"]), Route("/health", health), Route("/metrics", metrics)]
    return Starlette(routes=routes, middleware=guards(host, token), exception_handlers={HTTPException: _elsewhere})


async def _elsewhere(request: Request, fault: Exception) -> Response:
    """What is asked of no address, or not as one is asked, in a sentence of JSON like all that is wrong."""
    assert isinstance(fault, HTTPException)
    return JSONResponse({"error": f"{fault.detail}: there are {PLACES}"}, fault.status_code, fault.headers)


def _order(body: object, models: Mapping[str, Opened], most: int) -> tuple[Order, str]:
    """What a request asks for, checked as `iddpm sample` checks its flags, and the form that it is to have."""
    asked = checked(body, OWN | HOW)
    form, name = asked.get("format", "png"), asked.get("model", next(iter(models)))
    if form not in FORMS:
        raise UserError(f"format {form!r} is not one of: {', '.join(FORMS)}")
    if name not in models:
        raise UserError(f"model {name!r} is not one of: {', '.join(models)}")
    if "seeds" in asked and "num_samples" in asked:
        raise UserError("seeds and num_samples both say how many: give one")
    seeds = seed_list(asked["seeds"]) if "seeds" in asked else []
    count = len(seeds) if "seeds" in asked else asked.get("num_samples", 1)
    if not 1 <= count <= most:
        raise UserError(f"{count} images: ask for 1 to {most} at a time")
    opened = models[name]
    if form == "zip" and (why := sheets.no_png(opened.config.model)):
        raise UserError(f"format 'zip': {why}: take npz")
    config = configured(opened.config, asked)
    return Order(opened, config, job(config, seeds or range(count), asked.get("labels", ""))), form


# ---- the forms of an answer


def _png(images: np.ndarray, order: Order) -> Response:
    """A sheet of all, as `iddpm sample` draws it."""
    return Response(_saved(sheets.grid(images, order.job.labels, order.config.data.classes)), media_type="image/png")


def _npz(images: np.ndarray, order: Order) -> Response:
    file = io.BytesIO()
    arrays = {"arr_0": images} | ({"arr_1": np.array(order.job.labels)} if order.config.model.class_cond else {})
    arrays |= {"classes": np.array(names)} if (names := order.config.data.classes) and "arr_1" in arrays else {}
    np.savez(file, **arrays)  # type: ignore[arg-type]  # a flag of numpy's, which is no array, stands among them
    return Response(file.getvalue(), media_type="application/octet-stream")


def _zip(images: np.ndarray, order: Order) -> Response:
    """A PNG of each, by its seed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for seed, image in zip(order.job.seeds, images):
            archive.writestr(f"{seed:06d}.png", _saved(sheets.whole(image)))
    return Response(file.getvalue(), media_type="application/zip")


def _saved(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


FORMS: dict[str, Callable[[np.ndarray, Order], Response]] = {"png": _png, "npz": _npz, "zip": _zip}


def named(runs: list[Path], opened: list[Opened]) -> dict[str, Opened]:
    """Models by the last part of their path; UserError where two share one."""
    found: dict[str, Opened] = {}
    for path, model in zip(runs, opened):
        name = path.resolve().name
        if name in found:
            raise UserError(f"two runs are called {name}: serve one of them under another name, by a link")
        if model.config.task.inputs or model.config.task.classifies:
            raise UserError(f"{path} is {model.config.task.help}: only models that draw from noise alone are served")
        found[name] = model
    return found
