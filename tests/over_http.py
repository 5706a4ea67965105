"""A server in this process, and calls to it without any client's help."""

import contextlib
import http.client
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace


@contextlib.contextmanager
def running(service):
    """An address at which a service answers."""
    import uvicorn

    from jlora.serving.http import run

    server = uvicorn.Server(run.configured(service))
    with run.bound("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        yield f"127.0.0.1:{port}"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(holds, seconds=60):
    """Waits until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)


def is_idle(service):
    state = service.engine.state()
    return state.running == state.waiting == 0 and state.error is None


def ask(address, path, body=None, method=None, headers=None):
    """Status, headers and body of an answer; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection(address, timeout=120)
    try:
        given = {"Content-Type": "application/json"} | (headers or {})
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, given)
        answer = connection.getresponse()
        text = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return SimpleNamespace(status=answer.status, headers=answer.headers, body=json.loads(text) if is_json else text)
    finally:
        connection.close()


def copied(folders, name, place):
    """A copy of an adapter's folder among those that calls may load."""
    return Path(shutil.copytree(folders / name, folders / place))
