"""What is refused: by name, with the right status, in the form of OpenAI's errors, and at no cost to the others."""

import http.client
import json
import random
import socket
import string

import openai
import pytest
from over_http import ask, is_idle, running, until

from jlora.serving.http.app import Service

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("idle")]

PROMPT = {"model": "tiny", "prompt": "Once upon", "max_tokens": 2, "temperature": 0}
CHAT = {"model": "talk", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def user(**more):
    return {"messages": [{"role": "user", "content": "Hi"} | more]}


@pytest.mark.parametrize(
    ("path", "change", "status", "param", "words"),
    [
        (COMPLETIONS, {"model": None}, 400, "model", "model is missing"),
        (COMPLETIONS, {"model": 3}, 400, "model", "model must be a text, got 3"),
        (COMPLETIONS, {"model": "sqll"}, 404, "model", "there is no model 'sqll'; did you mean 'sql'?"),
        (COMPLETIONS, {"prompt": None}, 400, "prompt", "prompt is missing"),
        (COMPLETIONS, {"prompt": {}}, 400, "prompt", "must be a text, token ids"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "must be a text, token ids"),
        (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "must be a text, token ids"),
        (COMPLETIONS, {"prompt": [1, True]}, 400, "prompt", "must be a text, token ids"),
        (COMPLETIONS, {"prompt": [1, 512]}, 400, "prompt", "has the token 512: the model's are 0 to 511"),
        (COMPLETIONS, {"prompt": [1, -1]}, 400, "prompt", "has the token -1"),
        (COMPLETIONS, {"prompt": ["a"] * 7}, 400, "prompt", "has 7 prompts, at most 6"),
        (COMPLETIONS, {"prompt": [1] * 319}, 400, "prompt", "319 tokens; with the 2 of max_tokens that is more than the 320"),
        (COMPLETIONS, {"max_tokens": 0}, 400, "max_tokens", "must be a whole number from 1, got 0"),
        (COMPLETIONS, {"max_tokens": 2.0}, 400, "max_tokens", "must be a whole number from 1, got 2.0"),
        (COMPLETIONS, {"max_tokens": 10**30}, 400, "prompt", "more than the 320"),
        (COMPLETIONS, {"temperature": -0.1}, 400, "temperature", "must be a number, 0 or more, got -0.1"),
        (COMPLETIONS, {"temperature": True}, 400, "temperature", "must be a number, 0 or more, got true"),
        (COMPLETIONS, {"top_p": 0}, 400, "top_p", "above 0 and at most 1, got 0"),
        (COMPLETIONS, {"top_k": -2}, 400, "top_k", "must be a whole number from -1"),
        (COMPLETIONS, {"seed": -1}, 400, "seed", "must be a whole number from 0 to 4294967295"),
        (COMPLETIONS, {"seed": 2**32}, 400, "seed", "must be a whole number from 0 to 4294967295"),
        (COMPLETIONS, {"logprobs": 21}, 400, "logprobs", "from 0 to 20, got 21"),
        (COMPLETIONS, {"logprobs": True}, 400, "logprobs", "from 0 to 20, got true"),
        (COMPLETIONS, {"stop": ""}, 400, "stop", "must be a text or up to 16"),
        (COMPLETIONS, {"stop": ["a"] * 17}, 400, "stop", "must be a text or up to 16"),
        (COMPLETIONS, {"stop": [1]}, 400, "stop", "must be a text or up to 16"),
        (COMPLETIONS, {"n": 0}, 400, "n", "from 1 to 6"),
        (COMPLETIONS, {"n": 4, "prompt": ["a", "b"]}, 400, "n", "ask for 8 answers, at most 6"),
        (COMPLETIONS, {"stream": "yes"}, 400, "stream", "must be true or false, got \"yes\""),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream to be true"),
        (COMPLETIONS, {"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "is no field"),
        (COMPLETIONS, {"best_of": 2}, 400, "best_of", "is not there in this server"),
        (COMPLETIONS, {"echo": True}, 400, "echo", "is not there in this server"),
        (COMPLETIONS, {"suffix": "x"}, 400, "suffix", "is not there in this server"),
        (COMPLETIONS, {"logit_bias": {"5": 1}}, 400, "logit_bias", "is not there in this server"),
        (COMPLETIONS, {"presence_penalty": 0.5}, 400, "presence_penalty", "is not there in this server"),
        (COMPLETIONS, {"messages": []}, 400, "messages", "is no field that this server knows"),
        (COMPLETIONS, {"min_p": 0.1}, 400, "min_p", "is no field that this server knows"),
        (CHATS, {"model": "sql"}, 400, "model", "'sql' has no chat template"),
        (CHATS, {"messages": "Hi"}, 400, "messages", "must be a list of messages"),
        (CHATS, {"messages": []}, 400, "messages", "must be a list of messages"),
        (CHATS, {"messages": [3]}, 400, "messages[0]", "must be an object with role and content"),
        (CHATS, {"messages": [{"role": "user"}]}, 400, "messages[0].content", "is missing"),
        (CHATS, user(role="wizard"), 400, "messages", "no messages of role 'wizard'"),
        (CHATS, user(content=[{"type": "image_url", "image_url": {}}]), 400, "messages[0].content", "type text alone"),
        (CHATS, user(tool_calls=[{"id": "x"}]), 400, "messages[0].tool_calls", "is not there"),
        (CHATS, user(mood="good"), 400, "messages[0].mood", "is no field"),
        (CHATS, {"tools": [{"type": "function"}]}, 400, "tools", "is not there in this server"),
        (CHATS, {"response_format": {"type": "json_object"}}, 400, "response_format", "is not there in this server"),
        (CHATS, {"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs to be true"),
        (CHATS, {"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens", "are one thing"),
        (CHATS, {"prompt": "Hi"}, 400, "prompt", "is no field that this server knows"),
    ],
)  # fmt: skip
def test_what_a_field_can_not_be_is_said_by_its_name(call, path, change, status, param, words):
    answer = call(path, (CHAT if path == CHATS else PROMPT) | change)
    assert answer.status == status, answer.body
    found = answer.body["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["type"] == "invalid_request_error"
    assert found["param"] == param and words in found["message"]


def test_fields_that_ask_for_nothing_and_those_that_change_no_answer_are_taken(call):
    nothing = {"n": 1, "best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0.0,
               "logit_bias": {}, "stop": None, "user": "me", "seed": None, "logprobs": None}  # fmt: skip
    assert call(COMPLETIONS, PROMPT | nothing).body["choices"] == call(COMPLETIONS, PROMPT).body["choices"]
    nothing = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "metadata": {"a": "b"},
        "store": False,
    }
    assert call(CHATS, CHAT | nothing).body["choices"] == call(CHATS, CHAT).body["choices"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON that can be read"),
        (b"{", "no JSON that can be read"),
        (b"[]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b'{"model": NaN}', "NaN is no number of JSON"),
        (b'{"model": "tiny", "model": "sql"}', "'model' stands twice in one object"),
        (b'{"model": "\xff"}', "not valid UTF-8"),
        (b'{"model": "\\ud800"}', "half a surrogate pair"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"model": ' + b"9" * 5000 + b"}", "no JSON that can be read"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused(call, body, words):
    answer = call(COMPLETIONS, body)
    assert answer.status == 400 and words in answer.body["error"]["message"]


def test_other_types_paths_and_methods_are_refused_in_the_same_form(call):
    # A page of another site may send a form or a text, but no JSON.
    form = call(COMPLETIONS, json.dumps(PROMPT).encode(), headers={"Content-Type": "text/plain"})
    assert form.status == 415 and form.body["error"]["code"] == "unsupported_media_type"
    assert (
        call("/v1/nothing").status == 404 and "nothing at /v1/nothing" in call("/v1/nothing").body["error"]["message"]
    )
    assert call(COMPLETIONS).status == 405 and call("/health", {}).status == 405
    assert call("/v1/models/none").body["error"]["code"] == "model_not_found"


def test_clients_see_their_own_kinds_of_errors(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="tools is not there"):
        client.chat.completions.create(**CHAT, tools=[{"type": "function", "function": {"name": "f"}}])


def test_a_body_is_read_up_to_its_limit_alone(service):
    small = Service(service.engine, service.voice, service.shelf, body=1000)
    with running(small) as address:
        long = json.dumps(PROMPT | {"user": "x" * 2000}).encode()
        assert ask(address, COMPLETIONS, long).status == 413
        # Without a length beforehand, in chunks.
        with socket.create_connection(address.split(":")) as connection:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for start in range(0, len(long), 500):
                part = long[start : start + 500]
                connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 413 and b"larger than the 1,000 bytes" in answer.read()
        assert ask(address, COMPLETIONS, PROMPT).status == 200


def test_without_the_token_there_is_nothing_but_the_page_and_health(service):
    guarded = Service(service.engine, service.voice, service.shelf, token="s3cret", hosts=None)
    with running(guarded) as address:
        routes = ("/v1/models", "/metrics", "/v1/completions", "/v1/load_lora_adapter", "/nothing")
        for path in routes:
            for given in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "s3cret"},
                {"Authorization": "Bearer \xe9"},
            ):
                answer = ask(address, path, headers=given)
                assert answer.status == 401 and answer.body["error"]["code"] == "invalid_api_key"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert ask(address, "/").status == ask(address, "/health").status == 200
        right = openai.OpenAI(base_url=f"http://{address}/v1", api_key="s3cret", max_retries=0)
        assert right.completions.create(**PROMPT).choices[0].text
        with pytest.raises(openai.AuthenticationError, match="wanted the header"):
            right.with_options(api_key="other").models.list()


def test_a_server_of_this_machine_answers_to_its_own_names_alone(call):
    # So a page whose name leads to 127.0.0.1 reads nothing.
    for host in ("evil.example", "evil.example:8000", "[::2]", ""):
        answer = call("/v1/models", headers={"Host": host})
        assert answer.status == 403 and answer.body["error"]["code"] == "wrong_host"
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert call("/v1/models", headers={"Host": host}).status == 200


def mutants(rng, count):
    """Bodies that are broken in one way or several: cut, flipped, with values of another kind, with fields of others."""
    values = [
        None,
        True,
        -1,
        0,
        1e308,
        10**25,
        "",
        "x" * 300,
        "\x00",
        [],
        [[]],
        {},
        {"a": {}},
        [1, "a"],
        [None],
        -0.5,
        "tiny",
    ]
    fields = [*PROMPT, *CHAT, "stop", "n", "logprobs", "top_p", "seed", "stream", "stream_options", "tools", "x"]
    for number in range(count):
        path, body = (COMPLETIONS, dict(PROMPT)) if number % 2 else (CHATS, json.loads(json.dumps(CHAT)))
        if number % 3:
            for _ in range(rng.randint(1, 3)):
                body[rng.choice(fields)] = rng.choice(values)
            yield path, json.dumps(body).encode(), body
            continue
        text = bytearray(json.dumps(body).encode())
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 3)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 3)))
        yield path, bytes(text[: rng.randint(0, len(text))]), None


def test_a_thousand_malformed_calls_are_refused_and_the_next_is_answered_as_before(call, service, capfd):
    rng, before, statuses = random.Random(0), call(COMPLETIONS, PROMPT).body["choices"], []
    for path, text, body in mutants(rng, 1000):
        answer = call(path, text)
        statuses.append(answer.status)
        assert answer.status in (200, 400, 404), (text, answer.body)
        if answer.status == 200:  # what was changed is a body that can be, or another text
            assert body is None or body.get("model") in ("tiny", "talk"), text
        else:
            assert answer.body["error"]["message"]
    assert statuses.count(400) > 700
    for line in (
        b"GARBAGE\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"\x00" * 500,
        b"GET",
    ):
        with socket.create_connection(call.args[0].split(":")) as connection:
            connection.sendall(line)
    until(lambda: is_idle(service))
    assert call(COMPLETIONS, PROMPT).body["choices"] == before
    assert "Traceback" not in "".join(capfd.readouterr())


def test_long_names_are_cut_in_errors(call):
    name = "".join(random.Random(0).choices(string.ascii_letters, k=5000))
    assert len(call(COMPLETIONS, PROMPT | {"model": name}).body["error"]["message"]) < 400
    assert len(call(COMPLETIONS, PROMPT | {name: 1}).body["error"]["message"]) < 400
