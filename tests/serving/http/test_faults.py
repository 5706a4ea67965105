"""Clients that vanish, a full queue, an engine that fails, adapters that come, go and are damaged: no wrong answer, no leak."""

import asyncio
import dataclasses
import gc
import json
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from over_http import ask, copied, is_idle, running, until

from jlora.serving.http import app as http_app
from jlora.serving.http.answers import Answers
from jlora.serving.http.app import Service
from jlora.serving.http.refusals import Refused
from jlora.serving.request import Finished, Token
from jlora.serving.text import Text

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("idle")]

PROMPT = "Once upon a time there was a"
LONG = {"model": "sql", "prompt": PROMPT, "max_tokens": 300, "temperature": 1.5, "seed": 3, "stop": ["never written"]}
COMPLETIONS = "/v1/completions"


def sent(address, body):
    """A connection on which a call was sent."""
    connection = socket.create_connection(address.split(":"))
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def cancelled(service):
    return service.engine.state().finished.get("cancelled", 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("abrupt", [True, False])
def test_a_client_that_vanishes_takes_its_requests_along(server, service, call, stream, abrupt):
    before, written = cancelled(service), service.engine.state().tokens
    with sent(server, LONG | {"stream": stream, "n": 3}) as connection:
        if stream:
            assert b" 200 " in connection.recv(100)
        until(lambda: service.engine.state().tokens > written)
        if abrupt:  # a reset in place of a farewell
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    until(lambda: is_idle(service))
    assert cancelled(service) == before + 3
    assert service.engine.state().tokens - written < 3 * 300
    assert call("/health").status == 200


def test_nothing_is_left_of_calls_that_were_answered_refused_or_dropped(server, service, call):
    def left():
        until(lambda: is_idle(service))
        gc.collect()
        # Those of the event loop's pool are as many as it has use for, up to their limit.
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio")]
        answers = sum(isinstance(each, Answers | Text) for each in gc.get_objects())
        return answers, len(threads), len(os.listdir("/proc/self/fd"))

    def some():
        for stream in (True, False):
            assert call(COMPLETIONS, LONG | {"max_tokens": 2, "stream": stream}).status == 200
            assert call(COMPLETIONS, LONG | {"temperature": -1, "stream": stream}).status == 400
            sent(server, LONG | {"stream": stream}).close()

    some()
    before = left()
    for _ in range(10):
        some()

    def clean():
        # The engine's thread may hold the last request until the next comes: one call with one text.
        answers, *others = left()
        return answers <= 2 and all(now <= then for now, then in zip(others, before[1:], strict=True))

    # A connection is closed by the server a moment after its client has its answer; so one may have been left before.
    until(clean)


def test_a_client_that_vanishes_within_its_own_call_leaves_nothing(server, service):
    taken = service.engine.state().requests
    with socket.create_connection(server.split(":")) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {server}\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        connection.sendall(head.encode() + b'{"model": "sql", ')
    assert ask(server, COMPLETIONS, LONG | {"max_tokens": 1}).status == 200
    assert service.engine.state().requests == taken + 1


def test_a_full_queue_refuses_whole_calls_and_says_when_to_come_again(server, service, call):
    with sent(server, LONG | {"n": 6}):
        until(lambda: service.engine.state().running == 2)
        before = service.engine.state().finished
        answer = call(COMPLETIONS, LONG | {"n": 6})
        assert answer.status == 429 and answer.headers["Retry-After"] == "1"
        assert answer.body["error"]["code"] == "queue_full" and answer.body["error"]["type"] == "rate_limit_error"
    until(lambda: is_idle(service))
    after = service.engine.state().finished
    # Of the refused call those that had found room are cancelled with it.
    assert after.get("length", 0) - before.get("length", 0) <= 6 and after.get("error", 0) == 0
    with sent(server, LONG | {"n": 6}):
        until(lambda: service.engine.state().running == 2)
        client = openai.OpenAI(base_url=f"http://{server}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError, match="ask again later"):
            client.completions.create(**LONG, n=6)
    until(lambda: is_idle(service))


def test_a_server_that_ends_takes_no_more_and_finishes_what_it_has_begun(service):
    ending = Service(service.engine, service.voice, service.shelf)
    with running(ending) as address, ThreadPoolExecutor() as pool:
        begun = pool.submit(ask, address, COMPLETIONS, LONG | {"max_tokens": 100})
        until(lambda: service.engine.state().running == 1)
        ending.draining = True
        for path, body in ((COMPLETIONS, LONG), ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "sql"})):
            refused = ask(address, path, body)
            assert (
                refused.status == 503 and refused.body["error"]["code"] == "draining" and refused.headers["Retry-After"]
            )
        health = ask(address, "/health")
        assert health.status == 503 and health.body == {"status": "draining"}
        assert begun.result().body["usage"]["completion_tokens"] == 100


def test_an_engine_that_gives_an_answer_up_is_told_of_at_once_and_in_the_stream(service, monkeypatch):
    """The engine says so of its own accord when its program fails; here its word is put in its mouth."""

    def submit(prompt, *, listen, **options):
        for event in (Token(410), Token(410), Finished("error", "out of memory")):
            listen(event)
        return type("Request", (), {"cancel": lambda self: None})()

    failing = dataclasses.replace(service)
    with running(failing) as address:
        monkeypatch.setattr(service.engine, "submit", submit)
        answer = ask(address, COMPLETIONS, LONG)
        assert answer.status == 500
        assert answer.body["error"] | {"message": ""} == {
            "message": "", "type": "server_error", "param": None, "code": "engine_failed"
        }  # fmt: skip
        assert "out of memory" in answer.body["error"]["message"]
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(client.completions.create(**LONG, stream=True))


def test_an_adapter_comes_is_used_and_goes_while_the_server_runs(call, client, folders, service, wanted, words):
    copied(folders, "sql", "late")
    prompt = tuple(words.ids(PROMPT))
    assert call(COMPLETIONS, LONG | {"model": "late"}).status == 404
    programs = service.engine.state().programs
    assert call("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "late"}).body.startswith(b"Success")
    told = client.completions.create(model="late", prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text
    assert told == words.added(prompt, wanted("sql", prompt, 12))
    again = call("/v1/load_lora_adapter", {"lora_name": "late", "lora_path": str(folders / "late")})
    assert again.status == 400 and again.body["error"]["code"] == "name_taken"
    shutil.rmtree(folders / "late")  # it is in memory
    assert client.completions.create(model="late", prompt=PROMPT, max_tokens=12, temperature=0).choices[0].text == told
    assert call("/v1/unload_lora_adapter", {"lora_name": "late"}).body.startswith(b"Success")
    assert call(COMPLETIONS, LONG | {"model": "late"}).status == 404
    assert call("/v1/unload_lora_adapter", {"lora_name": "late"}).status == 404
    assert call("/v1/unload_lora_adapter", {"lora_name": "tiny"}).status == 400
    assert "late" not in service.engine.adapters and service.engine.state().programs == programs
    assert b'model="late"' not in call("/metrics").body


@pytest.mark.parametrize(
    "path", ["..", "/etc", "../../etc", "sql/../..", "gone", "no\0name", "x" * 5000, "notes/../../.."]
)
def test_a_call_loads_nothing_from_elsewhere(call, path):
    answer = call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": path})
    assert answer.status == 403 and answer.body["error"]["code"] == "path_refused"


def test_a_link_leads_nowhere_else(call, folders, tmp_path):
    jlora_folder = shutil.copytree(folders / "sql", tmp_path / "outside")
    (folders / "link").symlink_to(jlora_folder)
    try:
        assert call("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "link"}).status == 403
    finally:
        (folders / "link").unlink()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "sql"}, "lora_name"),
        ({"lora_name": "", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "a" * 201, "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "tiny", "lora_path": "sql"}, "lora_name"),
        ({"lora_name": "new"}, "lora_path"),
        ({"lora_name": "new", "lora_path": "sql", "load_inplace": True}, "load_inplace"),
        ({"lora_name": "new", "lora_path": "sql", "x": 1}, "x"),
        ({"lora_name": "new", "lora_path": "notes"}, "lora_path"),
    ],
)
def test_what_can_not_be_loaded_is_said(call, body, param):
    answer = call("/v1/load_lora_adapter", body)
    assert answer.status == 400 and answer.body["error"]["param"] == param


def damage_weights(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


def cut_weights(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])


def damage_template(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")


@pytest.mark.parametrize("damage", [damage_weights, cut_weights, damage_template])
def test_a_damaged_adapter_is_refused_and_leaves_no_trace(call, folders, service, damage):
    folder = copied(folders, "talk", "damaged")
    try:
        damage(folder)
        answer = call("/v1/load_lora_adapter", {"lora_name": "damaged", "lora_path": "damaged"})
        assert answer.status == 400 and answer.body["error"]["code"] == "adapter_refused", answer.body
        assert "damaged" not in service.engine.adapters
        assert call(COMPLETIONS, LONG | {"model": "damaged"}).status == 404
        assert call(COMPLETIONS, {"model": "talk", "prompt": "Hi", "max_tokens": 2}).status == 200
    finally:
        shutil.rmtree(folder)
    # The name is free again.
    copied(folders, "sql", "damaged")
    try:
        assert call("/v1/load_lora_adapter", {"lora_name": "damaged", "lora_path": "damaged"}).status == 200
        assert call("/v1/unload_lora_adapter", {"lora_name": "damaged"}).status == 200
    finally:
        shutil.rmtree(folders / "damaged")


def test_a_name_that_gets_another_adapter_is_each_in_its_time(call, client, folders, wanted, words):
    """A stream that began with one adapter ends with it, though its name has another before its end."""
    prompt = tuple(words.ids(PROMPT))
    asked = {"model": "one", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    load = {"lora_name": "one", "lora_path": "sql"}
    assert call("/v1/load_lora_adapter", load).status == 200
    stream = client.completions.create(**asked, stream=True)
    told = next(stream).choices[0].text
    assert call("/v1/unload_lora_adapter", {"lora_name": "one"}).status == 200
    assert call("/v1/load_lora_adapter", load | {"lora_path": "peft"}).status == 200
    now = client.completions.create(**asked).choices[0].text
    told += "".join(piece.choices[0].text for piece in stream)
    assert told == words.added(prompt, wanted("sql", prompt, 24)) and now == words.added(
        prompt, wanted("peft", prompt, 24)
    )
    assert call("/v1/unload_lora_adapter", {"lora_name": "one"}).status == 200


def test_a_name_that_changes_between_the_tokens_of_a_call_and_its_submission_is_looked_up_anew(
    call, folders, service, monkeypatch, words, wanted
):
    assert call("/v1/load_lora_adapter", {"lora_name": "two", "lora_path": "sql"}).status == 200
    entry, ask_for, times = service.shelf.find("two"), http_app.asking.completion, []

    def slow(body, found, voice, limits):
        times.append(found)
        if len(times) == 1:  # while the tokens of the call are made, another thread than the event loop's
            service.shelf._entries["two"] = dataclasses.replace(entry, adapter="peft")
        return ask_for(body, found, voice, limits)

    monkeypatch.setattr(http_app.asking, "completion", slow)
    prompt = tuple(words.ids(PROMPT))
    answer = call(COMPLETIONS, {"model": "two", "prompt": PROMPT, "max_tokens": 12, "temperature": 0})
    assert answer.body["choices"][0]["text"] == words.added(prompt, wanted("peft", prompt, 12))
    assert [each.adapter for each in times] == ["two", "peft"]
    assert call("/v1/unload_lora_adapter", {"lora_name": "two"}).status == 200


def test_two_calls_that_load_one_name_load_it_once(call, folders, service):
    with ThreadPoolExecutor() as pool:
        body = {"lora_name": "race", "lora_path": "sql"}
        found = [each.result().status for each in [pool.submit(call, "/v1/load_lora_adapter", body) for _ in range(4)]]
    assert sorted(found) == [200, 400, 400, 400] and "race" in service.engine.adapters
    assert call("/v1/unload_lora_adapter", {"lora_name": "race"}).status == 200


def test_many_callers_at_once_get_each_their_own(call, service, wanted, words):
    """Adapters come and go beside them all the while."""
    done = threading.Event()

    def churn():
        while not done.is_set():
            assert call("/v1/load_lora_adapter", {"lora_name": "churn", "lora_path": "talk"}).status == 200
            assert call("/v1/unload_lora_adapter", {"lora_name": "churn"}).status == 200

    prompts = ("Once upon a time", "The dog", "A big cat")
    asked = [(name, prompt) for name in ("tiny", "sql", "peft", "talk") for prompt in prompts] * 2

    def one(name, prompt):
        body = {"model": name, "prompt": prompt, "max_tokens": 10, "temperature": 0}
        while (answer := call(COMPLETIONS, body)).status == 429:
            pass
        return answer.body["choices"][0]["text"]

    with ThreadPoolExecutor(9) as pool:
        churning = pool.submit(churn)
        texts = list(pool.map(lambda each: one(*each), asked))
        done.set()
        churning.result()
    for (name, prompt), text in zip(asked, texts):
        ids = tuple(words.ids(prompt))
        assert text == words.added(ids, wanted(name, ids, 10)), (name, prompt)


def test_a_call_whose_second_request_is_refused_leaves_no_first(service, monkeypatch):
    """Without a server: what is submitted is cancelled where the next one is refused."""
    made = []

    class Some:
        def __init__(self):
            self.cancelled = False
            made.append(self)

        def cancel(self):
            self.cancelled = True

    def submit(prompt, **options):
        if len(made) == 2:
            raise http_app.asking.bad(None, "no")
        return Some()

    async def answers():
        asked = http_app.asking.completion(
            http_app.Body({"prompt": "Hi", "n": 3}), service.shelf.find("tiny"), service.voice, service.limits
        )
        Answers(service.engine, service.voice, asked, lambda count: None)

    monkeypatch.setattr(service.engine, "submit", submit)
    with pytest.raises(http_app.Refused):
        asyncio.run(answers())
    assert [each.cancelled for each in made] == [True, True]


def test_a_name_that_is_unknown_among_thousands_is_not_searched_for(service, monkeypatch):
    """The search for a near name takes the thread in which all calls are answered."""
    shelf = service.shelf

    def found(*_):
        raise AssertionError("searched")

    with pytest.raises(Refused, match="did you mean 'sql'"):
        shelf.find("sqll")
    monkeypatch.setattr("difflib.get_close_matches", found)
    with pytest.raises(Refused, match="GET /v1/models lists"):
        shelf.find("s" * 201)
    monkeypatch.setattr(shelf, "_entries", dict.fromkeys(map(str, range(2000))))
    with pytest.raises(Refused, match="GET /v1/models lists"):
        shelf.find("sqll")
