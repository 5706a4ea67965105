"""Which template chats are written with, which part of the text is learned, and where the template goes."""

import dataclasses
import json
import shutil

import pytest

import jlora
from jlora import models
from jlora.models.chat_files import read_chat_templates
from jlora.models.config import read_config
from jlora.training.commands.exchange import export_run, import_adapter
from jlora.training.commands.runs import Run, open_run, write_merged
from jlora.training.data import chat
from jlora.training.data.encode import encode_language
from jlora.training.data.messages import messages_of, variables_of
from jlora.training.data.rows import Row
from jlora.training.data.tokens import Codec
from jlora.training.errors import DataError, SettingError
from jlora.training.job import finetune
from jlora.training.model.subject import load_subject, open_codec
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once

TWO_TURNS = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "<think>T1</think>A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "<think>T2</think>A2"},
]


def model_with(folder, source, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, "eos_token": "</s>", **config}))
    return folder


def learned(template, messages, **more):
    return [text for text, answer in template(messages, **more) if answer]


def row(**values):
    return Row(values, "a.jsonl", 7)


def test_chatml_marks_the_end_of_an_answer():
    template = chat.template("chatml", models.STORIES260K, {"<|im_start|>": 1, "<|im_end|>": 2})
    assert learned(template, [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]) == [
        "A<|im_end|>"
    ]
    with pytest.raises(ValueError, match="lacks <|im_start|> and <|im_end|>; use --chat-template plain"):
        chat.template("chatml", models.STORIES260K, {})


def test_the_models_own_template_is_taken_first(tmp_path):
    source = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    template = chat.template("auto", model_with(tmp_path, source), {})
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert not template.notes
    assert template(messages * 2) == [
        ("[user]Q[assistant]", False), ("A</s>", True), ("[user]Q[assistant]", False), ("A</s>", True),
    ]  # fmt: skip


def test_without_a_template_the_choice_is_told():
    for vocabulary, name in (({}, "plain"), ({"<|im_start|>": 1, "<|im_end|>": 2}, "chatml")):
        template = chat.template("auto", models.STORIES260K, vocabulary)
        assert template.name == name
        assert f"stories260k has no chat template: chats are written as '{name}'" in template.notes[0]
        assert not chat.template(name, models.STORIES260K, vocabulary).notes
    with pytest.raises(ValueError, match=r"stories260k has no chat template .*; use --chat-template plain"):
        chat.template("model", models.STORIES260K, {})


HEADERS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% else %}<|bot|>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
)
# What a template does to the text before or after a message when others follow it; what is to be learned.
REWRITES = {
    "the end of a text at the end alone": (
        HEADERS + "{% if add_generation_prompt %}<|bot|>{% else %}<|endoftext|>{% endif %}",
        ["A1<|end|>", "<think>T2</think>A2<|end|><|endoftext|>"],
    ),
    "a header that opens the reasoning": (
        HEADERS + "{% if add_generation_prompt %}<|bot|><think>{% endif %}",
        ["A1<|end|>", "T2</think>A2<|end|>"],
    ),
    "a header that opens another tag": (
        HEADERS + "{% if add_generation_prompt %}<|bot|><thoughts>{% endif %}",
        ["A1<|end|>", "<think>T2</think>A2<|end|>"],
    ),
    "a count of messages at the start": (
        "{{ messages | length }}" + HEADERS + "{% if add_generation_prompt %}<|bot|>{% endif %}",
        ["A1<|end|>", "<think>T2</think>A2<|end|>"],
    ),
    "no header to ask by": (HEADERS, ["<|bot|>A1<|end|>", "<|bot|><think>T2</think>A2<|end|>"]),
}


@pytest.mark.parametrize("what", REWRITES)
def test_answers_are_found_where_earlier_messages_are_rewritten(tmp_path, what):
    source, answers = REWRITES[what]
    assert learned(chat.template("model", model_with(tmp_path, source), {}), TWO_TURNS) == answers


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "it does not write message 2 between those"),
        (
            HEADERS.replace(
                "<|end|>{% endif %}{% endfor", "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor"
            )
            + "{% if add_generation_prompt %}<|bot|>{% endif %}",
            "it writes message 2 otherwise when others follow it",
        ),
        (HEADERS + "{% if add_generation_prompt %}<|answer|>{% endif %}", "it asks for message 2 by a header"),
    ],
)
def test_a_template_of_which_answers_cannot_be_told_is_refused(tmp_path, source, reason):
    with pytest.raises(
        ValueError, match=rf"tokenizer_config.json\) does not tell .*: {reason}.*generation.*FILE.jinja"
    ):
        chat.template("model", model_with(tmp_path, source), {})(TWO_TURNS)


def test_a_chat_may_begin_with_an_answer(tmp_path):
    source = HEADERS + "{% if add_generation_prompt %}<|bot|>{% endif %}"
    template = chat.template("model", model_with(tmp_path, source), {})
    assert learned(template, TWO_TURNS[1:]) == ["A1<|end|>", "<think>T2</think>A2<|end|>"]
    with pytest.raises(ValueError, match="the chat begins with an answer"):
        chat.template("model", model_with(tmp_path, HEADERS), {})(TWO_TURNS[1:])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", r"tokenizer_config.json: the chat template is not valid Jinja, line 1"),
        ("{{ messages.append(1) }}", r"tokenizer_config.json\) fails on this chat: SecurityError"),
        ("{{ ''.__class__.__mro__ }}", r"fails on this chat: SecurityError"),
        ("{{ namespace(_a=1) }}", r"fails on this chat: SecurityError"),
        ("{{ raise_exception('No.') }}", r"tokenizer_config.json\) refuses the messages: No\."),
        (
            "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
            r"marks no text of this chat by {% generation %}",
        ),
        (
            "{% macro say(x) %}<{% generation %}{{ x }}{% endgeneration %}{% endmacro %}{{ say('A') }}",
            r"has a {% generation %} block inside a macro",
        ),
        ("{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}", r"block inside .* another one"),
    ],
)
def test_a_template_that_does_not_work_is_named(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        chat.template("model", model_with(tmp_path, source), {})(TWO_TURNS)


@pytest.mark.parametrize("damaged", [7, [{"name": "default"}], ["x"], {"default": None}])
def test_a_damaged_list_of_templates_is_named(tmp_path, damaged):
    with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template must be a text or a list"):
        chat.template("auto", model_with(tmp_path, damaged), {})


def test_it_is_told_what_a_template_leaves_out(tmp_path):
    """As Mistral's does, which writes the system's words before a question at the end alone."""
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    template = chat.template("model", model_with(tmp_path, source), {})
    template(TWO_TURNS)
    assert not template.notes
    template([{"role": "system", "content": "Be kind."}, *TWO_TURNS])
    assert template.notes == [
        "the chat template leaves a message of the system or the user out of the text that is trained on, in 1 of the chats"
    ]


def test_a_template_may_come_from_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert chat.template(str(tmp_path / "own.jinja"), models.STORIES260K, {})(TWO_TURNS[:1]) == [("Q1", True)]
    assert Settings(chat_template="own.jinja").chat_template == "own.jinja"
    with pytest.raises(
        SettingError, match="chat_template must be auto, model, chatml, plain or a .jinja file, got 'qwen'"
    ):
        Settings(chat_template="qwen")


def test_a_models_text_is_trained_on_as_it_is_served(tmp_path):
    """No token is set before it; an end follows a last answer that has none."""
    directory = models.STORIES260K
    codec = Codec(models.load_tokenizer(directory), read_config(directory), directory)
    messages = [{"role": "user", "content": "Who"}, {"role": "assistant", "content": "me"}]
    for end in ("", "</s>\n"):
        source = "{% for m in messages %}{{ m.content }} " + end + "{% endfor %}"
        template = chat.template("model", model_with(tmp_path, source), {})
        example = encode_language([row(messages=messages)], codec, lambda made=template: made, "text", 64)[0]
        ids = codec.tokenizer.encode(f"Who {end}me {end}", add_special_tokens=False).ids
        assert [*example.tokens[:1], *example.targets] == ids + [codec.end] * (not end)
        assert example.weights[-1] == 1


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": ""},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
    ],
)
def test_messages_pass_as_templates_know_them(message):
    messages = [message, {"role": "assistant", "content": "A"}]
    assert messages_of(row(messages=messages)) == messages


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "assistant", "content": ""}, "message 1 must be {role, content} with a text that is not empty"),
        ({"role": "user", "content": None}, "message 1 must be {role, content} with a text"),
        ({"role": "assistant", "content": "", "tool_calls": "f()"}, "message 1 must have tool_calls that are a list"),
        ({"role": "developer", "content": "x"}, "message 1 has the role 'developer'; wanted system, user"),
        ("Hi", "message 1 must be {role, content}, got 'Hi'"),
    ],
)
def test_messages_that_are_none_are_named(message, complaint):
    with pytest.raises(DataError, match="a.jsonl:7: " + complaint):
        messages_of(row(messages=[message, {"role": "assistant", "content": "A"}]))


def test_a_role_that_the_template_names_passes(tmp_path):
    template = chat.template("model", model_with(tmp_path, "{{ messages[0].role == 'developer' }}"), {})
    assert messages_of(row(messages=[{"role": "developer", "content": "x"}, TWO_TURNS[1]]), template.knows)


def test_tools_and_other_variables_reach_the_template(tmp_path):
    values = {
        "tools": json.dumps([CALL]),
        "documents": [{"title": "D"}],
        "chat_template_kwargs": {"loud": True},
        "id": 3,
    }
    assert variables_of(row(**values)) == {"tools": [CALL], "documents": [{"title": "D"}], "loud": True}
    for wrong, complaint in (("f", "'tools' is a text that is not JSON"), (["f"], "'tools' must be a list")):
        with pytest.raises(DataError, match="a.jsonl:7: " + complaint):
            variables_of(row(tools=wrong))
    source = "{{ tools | tojson }}|{{ documents[0].title }}|{{ loud }}|"
    assert chat.template("model", model_with(tmp_path, source), {}).render([], **variables_of(row(**values))) == (
        json.dumps([CALL]) + "|D|True|"
    )


@pytest.mark.parametrize(
    ("name", "messages"),
    [("tools", TWO_TURNS), ("tool_calls", [*TWO_TURNS[:3], {**TWO_TURNS[3], "tool_calls": [CALL]}])],
)
def test_tools_for_which_the_template_has_no_place_are_refused(name, messages):
    template = chat.template("plain", models.STORIES260K, {})
    with pytest.raises(ValueError, match=rf"there are {name}, but the chat template \(plain\) has no place for them"):
        template(messages, **({"tools": [CALL]} if name == "tools" else {}))


DATED = (
    "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\nassistant: {% endif %}"
)


@pytest.fixture
def model(tmp_path):
    """The shipped model with a template that writes the time, and an older one in its configuration."""
    folder = shutil.copytree(models.STORIES260K, tmp_path / "model")
    model_with(folder, "an older one", bos_token="<s>", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": TWO_TURNS}) + "\n") * 4)
    return Settings(
        data=str(tmp_path / "chats.jsonl"), steps=2, batch=2, max_length=96, rank=2, targets=".*/q_proj/kernel", packing=False,
        checkpoint_every=1, sample_tokens=0, progress="none", out=str(tmp_path / "run"),
    )  # fmt: skip


def kept(folder):
    return {name: source.text for name, source in read_chat_templates(folder).items()} == {"default": DATED}


def check_templates(run, folder):
    """Merged and exported, a run keeps the template that it was trained with."""
    write_merged(run, folder / "merged")
    export_run(run, folder / "adapter", "peft", None, None)
    assert kept(folder / "merged") and kept(folder / "adapter")
    assert json.loads((folder / "merged" / "tokenizer_config.json").read_text())["chat_template"] == DATED


def test_the_trained_template_goes_where_the_model_goes(model, settings, tmp_path):
    asked = resolve(dataclasses.replace(settings, model=str(model), scan_layers=False))
    subject = load_subject(asked, *open_codec(asked))
    # Matrices as they lie in the file: nothing need be traced.
    adapted = jlora.adapterize(subject.params, {".*/gate_proj/kernel": jlora.LoRA(rank=1)})
    check_templates(Run(asked, subject, adapted, model, chat.template("auto", model, {})), tmp_path)


def test_a_saved_model_takes_all_its_templates_along(model, tmp_path):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    loaded, params = models.load(model)
    models.save(tmp_path / "out", loaded, params, source=model)
    assert [source.text for source in read_chat_templates(tmp_path / "out").values()] == [DATED, "tools"]


@pytest.mark.long
def test_a_resumed_run_sees_the_time_at_which_it_began(model, settings, tmp_path, unplugged):
    settings = dataclasses.replace(settings, model=str(model))
    with unplugged(2):
        finetune(settings, lambda text: None)
    finetune(dataclasses.replace(settings, resume=True), lambda text: None)
    (model / "chat_template.jinja").write_text("a newer one")
    check_templates(open_run(tmp_path / "run"), tmp_path)
    import_adapter(tmp_path / "adapter", str(model), tmp_path / "imported")
    assert kept(tmp_path / "imported") and kept(tmp_path / "run")


@pytest.mark.long
def test_a_run_says_what_it_writes_chats_with(settings, tmp_path):
    lines = []
    finetune(settings, lines.append)
    assert any("note" in line and "has no chat template: chats are written as 'plain'" in line for line in lines)
    template = open_run(tmp_path / "run").template
    assert template.name == "plain" and not template.whole
