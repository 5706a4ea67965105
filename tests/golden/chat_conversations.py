"""Conversations, templates and folders that `make_chat.py` shows to transformers and `test_chat_golden.py` to jlora."""

import json
import re
from datetime import datetime
from pathlib import Path

TEMPLATES = Path(__file__).with_name("chat")
NOW = datetime(2024, 2, 29, 13, 5)
TOKENS = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "pad_token": None}


def said(*turns):
    """`("user", "Hi")` and so on as messages."""
    return [{"role": role, "content": content} for role, content in turns]


def call(name, **arguments):
    return {"type": "function", "id": f"{name}x" * 9, "function": {"name": name, "arguments": arguments}}


def calls(*names):
    made = [{**call(name, city="Zürich <b>", days=2), "id": (name + "_" * 9)[:9]} for name in names]
    return {"role": "assistant", "content": "", "tool_calls": made}


def result(name, content):
    return {"role": "tool", "name": name, "tool_call_id": (name + "_" * 9)[:9], "content": content}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather of a city, in °C & "words".',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "time", "description": "<now>", "parameters": {"type": "object"}}},
]
CONVERSATIONS = {
    "one turn": {"messages": said(("user", "Who?"), ("assistant", "The dog."))},
    "a system and two turns": {
        "messages": said(
            ("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi you"), ("user", "Bye"), ("assistant", "See you")
        )
    },
    "an empty system": {"messages": said(("system", ""), ("user", "Q"), ("assistant", "A"))},
    "letters, tags and blanks": {
        "messages": said(
            ("user", "  Ärger & <b>\"Öl\"</b>?\n\n"), ("assistant", "\n<b>日本</b> 👩‍🚀 'ok' \n"), ("user", "שלום"),
            ("assistant", "<thanks>\u2028\\n"),
        )
    },
    "the same answers": {"messages": said(*[("user", "Q"), ("assistant", "A")] * 3)},
    "a question at the end": {"messages": said(("user", "Q"), ("assistant", "A"), ("user", "Q"))},
    "reasoning in the text": {
        "messages": said(
            ("user", "1+1"), ("assistant", "<think>\nOne and one.\n</think>\n\n2"), ("user", "2+2"),
            ("assistant", "<think>\nTwo and two.\n</think>\n\n4"),
        )
    },
    "reasoning beside the text": {
        "messages": [
            {"role": "user", "content": "1+1", "name": None},
            {"role": "assistant", "content": "2", "reasoning_content": "One and one.", "tool_calls": None},
            {"role": "user", "content": "2+2"},
            {"role": "assistant", "content": "4", "reasoning": "Two and two."},
        ]
    },
    "a quoted result": {
        "messages": said(
            ("user", "Look"), ("assistant", "<think>\nWhere?\n</think>\n\nSend it."),
            ("user", "<tool_response>\n7\n</tool_response>"), ("assistant", "<think>\nSeven.\n</think>\n\nSeven it is."),
        )
    },
    "a tool": {
        "messages": [
            *said(("system", "Be exact."), ("user", "Weather?")), calls("weather"), result("weather", '{"t": "3 °C"}'),
            *said(("assistant", "Cold."), ("user", "And now?")), calls("time"), result("time", "noon"),
            *said(("assistant", "Noon.")),
        ],
        "tools": TOOLS,
    },
    "two calls at once": {
        "messages": [
            *said(("user", "Both?")), {**calls("weather", "time"), "content": "I look.", "reasoning_content": "Two."},
            result("weather", "rain"), result("time", "noon"), *said(("assistant", "Rain at noon.")),
        ],
        "tools": TOOLS,
    },
    "a call without a list of tools": {
        "messages": [*said(("user", "Time?")), calls("time"), result("time", "noon"), *said(("assistant", "Noon."))],
    },
    "no thinking, please": {
        "messages": said(("user", "Q"), ("assistant", "A")), "variables": {"enable_thinking": False},
    },
}  # fmt: skip


def arguments(conversation):
    """What a template sees beside the messages."""
    return {**{k: v for k, v in conversation.items() if k == "tools"}, **conversation.get("variables", {})}


FAMILIES = ("llama3", "qwen2_5", "qwen3", "mistral", "gemma", "smollm2")


def source(family, generation):
    """A family's template, with its `{% generation %}` blocks or without."""
    text = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return text if generation else re.sub(r"\{%(-?) (end)?generation %\}", r"{#\1 #}", text)


# Which of several templates is read: each writes its own name.
FOLDERS = {
    "a file": {"chat_template.jinja": "file"},
    "a text in the configuration": {"chat_template": "configured"},
    "a file beside a text": {"chat_template.jinja": "file", "chat_template": "configured"},
    "a list": {"chat_template": [{"name": "default", "template": "first"}, {"name": "rag", "template": "rag"}]},
    "a list with one for tools": {
        "chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "first"}]
    },
    "a list without a main one": {"chat_template": [{"name": "tool_use", "template": "tools"}]},
    "more files": {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "more"},
    "more files beside a text": {"additional_chat_templates/tool_use.jinja": "more", "chat_template": "configured"},
    "a main one among more files": {"additional_chat_templates/default.jinja": "more", "chat_template.jinja": "file"},
    "tokens of an older time": {
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ image_token }}|{{ sep_token is defined }}",
        "special_tokens_map.json": '{"eos_token": {"content": "<e>", "lstrip": false}, "image_token": "<img>"}',
    },
    "tokens of today": {
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}|{{ image_token }}|{{ own_token }}",
        "extra_special_tokens": {"image_token": "<img>"},
        "own_token": "<own>",
    },
}


def write_folder(folder, files):
    """A tokenizer's directory of what stands in `FOLDERS`."""
    folder.mkdir()
    config = dict(TOKENS)
    for name, content in files.items():
        path = folder / name
        if path.suffix:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
        else:
            config[name] = content
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
