"""What is answered: each adapter's own text, in OpenAI's form, by OpenAI's client."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from over_http import is_idle, until
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("idle")]

PROMPT = "Once upon a time there was a"
NAMES = ("tiny", "sql", "talk", "peft")


def test_the_base_and_each_adapter_are_models_of_the_list(client):
    found = {model.id: model for model in client.models.list()}
    assert tuple(found) == ("tiny", "peft", "sql", "talk")
    assert {name: model.parent for name, model in found.items()} == {n: None if n == "tiny" else "tiny" for n in found}
    assert {name for name, model in found.items() if model.chat} == {"talk"}
    assert client.models.retrieve("sql").max_model_len == 320


@pytest.mark.parametrize("name", NAMES)
def test_each_name_answers_by_its_own_adapter_at_once_and_in_pieces(client, wanted, words, name):
    prompt = words.ids(PROMPT)
    ids = wanted(name, tuple(prompt), 24)
    asked = {"model": name, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == words.added(prompt, ids) and whole.model == name
    assert whole.choices[0].finish_reason == ("length" if len(ids) == 24 else "stop")
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        len(prompt),
        len(ids),
        len(prompt) + len(ids),
    )
    *pieces, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text and len(pieces) > 5
    assert [p.choices[0].finish_reason for p in pieces if p.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert last.choices == [] and last.usage == usage


def test_a_completion_of_no_length_has_16_tokens_or_what_is_free(client):
    for free, wanted in ((20, 16), (5, 5)):
        answer = client.completions.create(model="sql", prompt=[1] + [410] * (319 - free), temperature=0)
        assert answer.usage.completion_tokens <= wanted and (answer.choices[0].finish_reason == "length") == (
            answer.usage.completion_tokens == wanted
        )


def test_adapters_answer_differently_side_by_side_in_one_batch(client, wanted, words):
    prompt = tuple(words.ids(PROMPT))
    texts = {name: words.added(prompt, wanted(name, prompt, 24)) for name in NAMES}
    assert len(set(texts.values())) == len(NAMES)
    streams = [
        (name, client.completions.create(model=name, prompt=PROMPT, max_tokens=24, temperature=0, stream=True))
        for name in NAMES
    ]
    told = dict.fromkeys(NAMES, "")
    while streams:
        for each in list(streams):
            name, stream = each
            piece = next(stream, None)
            if piece is None:
                streams.remove(each)
            else:
                told[name] += piece.choices[0].text
    assert told == texts


def test_a_chat_is_written_as_its_adapter_was_trained(client, wanted, words):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    text = "<s>system: Be short.\n<s>user: Hi\n<s>assistant:"
    prompt = words.tokenizer.encode(text, add_special_tokens=False).ids
    ids = wanted("talk", tuple(prompt), 20)
    asked = {"model": "talk", "messages": messages, "temperature": 0, "max_completion_tokens": 20}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == words.added(prompt, ids) and whole.choices[0].message.role == "assistant"
    assert whole.usage.prompt_tokens == len(prompt) and whole.object == "chat.completion"
    first, *pieces = client.chat.completions.create(**asked, stream=True)
    assert first.choices[0].delta.role == "assistant" and first.object == "chat.completion.chunk"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_a_chat_without_a_limit_may_fill_the_row(client, call):
    body = {"model": "talk", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    answer = call("/v1/chat/completions", body).body
    ended = answer["choices"][0]["finish_reason"]
    assert ended == "stop" or answer["usage"]["total_tokens"] == 320


def test_a_text_ends_before_the_first_stop_text_however_tokens_are_cut(client, wanted, words):
    prompt = tuple(words.ids(PROMPT))
    whole = words.added(prompt, wanted("tiny", prompt, 24))
    middle = len(whole) // 2
    for stop in (whole[middle : middle + 5], [whole[middle : middle + 2], "no such text"], whole[:1]):
        first = stop if isinstance(stop, str) else stop[0]
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stop": stop}
        answer = client.completions.create(**asked)
        assert answer.choices[0].text == whole[: whole.index(first)]
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 24
        pieces = [piece.choices[0].text for piece in client.completions.create(**asked, stream=True)]
        assert "".join(pieces) == answer.choices[0].text


def test_probabilities_are_those_of_the_model_and_their_tokens_make_up_the_text(client, trained, words, wanted):
    prompt = words.ids(PROMPT)
    ids = wanted("tiny", tuple(prompt), 8)
    logits = trained.model.apply({"params": trained.params}, jnp.array([[*prompt, *ids]]))
    logprobs = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1]))
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    choice = client.completions.create(**asked, logprobs=3).choices[0]
    found = choice.logprobs
    np.testing.assert_allclose(found.token_logprobs, logprobs[range(8), ids], atol=1e-4)
    np.testing.assert_allclose([max(top.values()) for top in found.top_logprobs], logprobs.max(-1), atol=1e-4)
    assert "".join(found.tokens) == choice.text and all(len(top) == 3 for top in found.top_logprobs)
    assert [choice.text[start:].startswith(token) for start, token in zip(found.text_offset, found.tokens)] == [
        True
    ] * 8
    pieces = [piece.choices[0] for piece in client.completions.create(**asked, logprobs=3, stream=True)]
    assert [token for piece in pieces if piece.logprobs for token in piece.logprobs.tokens] == found.tokens


def test_probabilities_of_a_chat_leave_a_stop_text_out(client, words, wanted):
    text = "<s>user: Hi\n<s>assistant:"
    prompt = words.tokenizer.encode(text, add_special_tokens=False).ids
    whole = words.added(prompt, wanted("talk", tuple(prompt), 12))
    stop = whole[len(whole) // 2 :][:3]
    asked = {"model": "talk", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 12}
    choice = client.chat.completions.create(**asked, stop=stop, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    told = b"".join(bytes(each.bytes) for each in content).decode()
    assert choice.message.content == whole[: whole.index(stop)] and told.startswith(choice.message.content)
    # The last token may hold the beginning of the stop text beside the end of what is told.
    assert len(content) < 12 and len(told) - len(content[-1].bytes) < len(choice.message.content)
    assert all(
        [t.logprob for t in each.top_logprobs][:1] == [each.logprob] and len(each.top_logprobs) == 2 for each in content
    )
    (plain,) = client.chat.completions.create(**asked | {"max_tokens": 1}, logprobs=True).choices
    assert plain.logprobs.content[0].top_logprobs == []


def test_many_prompts_and_answers_are_told_apart(client, wanted, words):
    prompts = [words.ids("The dog"), words.ids("A big cat")]
    whole = client.completions.create(model="sql", prompt=prompts, n=2, max_tokens=6, temperature=0)
    texts = [words.added(prompt, wanted("sql", tuple(prompt), 6)) for prompt in prompts]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in whole.choices] == [texts[0], texts[0], texts[1], texts[1]]
    assert whole.usage.prompt_tokens == sum(map(len, prompts)) and whole.usage.completion_tokens == 24
    told = dict.fromkeys(range(2), "")
    for piece in client.completions.create(
        model="sql", prompt=["The dog", "A big cat"], max_tokens=6, temperature=0, stream=True
    ):
        told[piece.choices[0].index] += piece.choices[0].text
    assert list(told.values()) == texts


def test_a_seed_gives_the_same_text_again_and_n_answers_have_seeds_that_follow(client):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.2}
    both = [choice.text for choice in client.completions.create(**asked, seed=5, n=2).choices]
    alone = [client.completions.create(**asked, seed=seed).choices[0].text for seed in (5, 6)]
    assert both == alone and alone[0] != alone[1]
    free = {client.completions.create(**asked).choices[0].text for _ in range(3)}
    assert len(free) > 1
    one = client.completions.create(**asked, seed=5, extra_body={"top_k": 1}).choices[0].text
    assert one == client.completions.create(**asked | {"temperature": 0}).choices[0].text


def test_numbers_are_told_as_prometheus_reads_them_and_nothing_is_compiled_by_calls(client, call, service):
    def numbers():
        text = call("/metrics").body.decode()
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = numbers()
    answer = client.completions.create(model="sql", prompt=PROMPT, max_tokens=5, temperature=0)
    assert call("/v1/completions", b"{").status == 400
    assert call("/v1/nothing").status == 404
    until(lambda: is_idle(service))
    after = numbers()

    def rise(*name):
        return after[name] - before.get(name, 0)

    assert rise("jlora_model_requests_total", "sql") == rise("jlora_requests_finished_total", "length") == 1
    assert rise("jlora_model_generation_tokens_total", "sql") == rise("jlora_generation_tokens_total") == 5
    assert rise("jlora_prompt_tokens_total") == answer.usage.prompt_tokens
    assert rise("jlora_http_requests_total", "/v1/completions", "200") == 1
    assert rise("jlora_http_requests_total", "/v1/completions", "400") == 1
    assert rise("jlora_http_requests_total", "404", "other") == 1
    assert rise("jlora_time_to_first_token_seconds_count") == rise("jlora_request_seconds_count") == 1
    assert after[("jlora_up",)] == 1 and after[("jlora_adapters",)] == 3 and after[("jlora_rows",)] == 2
    assert after[("jlora_programs",)] == before[("jlora_programs",)] > 0


def test_events_are_as_openai_sends_them(server, call):
    answer = call(
        "/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
    )
    assert answer.headers.get_content_type() == "text/event-stream" and answer.headers["Cache-Control"] == "no-cache"
    *events, end = answer.body.decode().strip().split("\n\n")
    assert end == "data: [DONE]" and all(json.loads(event.removeprefix("data: "))["choices"] for event in events)
