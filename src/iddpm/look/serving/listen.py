"""Where a server of ours listens, and how it ends."""

import socket
from contextlib import suppress
from typing import Any

from iddpm.errors import UserError, readable, reason
from iddpm.look.serving.guard import is_local
from iddpm.store.remote import place


def token_of(host: str, file: str) -> str:
    """The token in a file; UserError where others can reach the host and there is none."""
    token = ""
    if file:
        with readable(file, "holds no token", "write one line of text into it"):
            token = place(file).read_text().strip()
            if not (token.isascii() and token.isprintable() and token):
                raise ValueError("one line of ASCII is needed" if token else "it is empty")
    if not (token or is_local(host)):
        raise UserError(f"--host {host} can be reached by others: give --token_file FILE, whose token they must bring")
    return token


def listening(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens there, and its address; UserError where it is taken. Port 0: a free one."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host.strip("[]"), port))
        found.listen(128)  # before the address is told: who then asks waits until it is answered
    except (OSError, OverflowError, UnicodeError) as e:
        found.close()
        raise UserError(f"port {port} of {host} cannot be taken ({reason(e)}): give another --port, or 0") from None
    return found, f"http://{host}:{found.getsockname()[1]}"


def serve(app: Any, where: socket.socket) -> None:
    """Answer until a signal ends it: what is being answered then is, for some seconds."""
    import uvicorn

    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    with suppress(KeyboardInterrupt):  # it has answered what was being drawn, and gives the signal on: to end so is no fault
        uvicorn.Server(settings).run(sockets=[where])
