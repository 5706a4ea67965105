"""Chats become what transformers makes of them: text, tokens, and which of them the assistant wrote.

What transformers makes of them was written by `golden/make_chat.py`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from chat_conversations import CONVERSATIONS, FAMILIES, FOLDERS, NOW, TOOLS, arguments, said, source, write_folder

from jlora import models
from jlora.models.config import read_config
from jlora.training.data import chat
from jlora.training.data.encode import encode_language
from jlora.training.data.rows import Row
from jlora.training.data.tokens import Codec

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "chat.json").read_text(encoding="utf-8"))


def template_of(folder, family, generation):
    """A family's template, from a model's directory."""
    write_folder(folder / "model", {"chat_template.jinja": source(family, generation)})
    return chat.template("auto", folder / "model", {}, NOW)


def spans(segments):
    ends = np.cumsum([len(text) for text, _ in segments])
    return [[end - len(text), end] for end, (text, answer) in zip(ends.tolist(), segments) if answer]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_transformers(tmp_path, family):
    template = template_of(tmp_path, family, False)
    for title, golden in GOLDEN["chats"][family].items():
        messages, more = CONVERSATIONS[title]["messages"], arguments(CONVERSATIONS[title])
        for prompt, text in ((False, golden.get("text")), (True, golden["prompt"])):
            if text is not None:
                assert template.render(messages, prompt, **more) == text, title
                continue
            with pytest.raises(ValueError, match=r"chat_template.jinja\) refuses the messages: " + golden["error"]):
                template.render(messages, prompt, **more)


@pytest.mark.parametrize("generation", [True, False], ids=["marked", "not marked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_what_the_assistant_wrote_in_the_whole_text(tmp_path, family, generation):
    """Marked or found, they are the blocks that transformers reports for the marked template."""
    template = template_of(tmp_path, family, generation)
    for title, golden in GOLDEN["chats"][family].items():
        conversation = CONVERSATIONS[title]
        if "error" in golden or (
            family == "smollm2" and "call" in json.dumps(GOLDEN["chats"]["qwen2_5"][title]["text"])
        ):
            continue
        segments = template(conversation["messages"], **arguments(conversation))
        assert "".join(text for text, _ in segments) == golden["text"]
        asked_for = "<think>\n\n</think>\n\n" if (family, title) == ("qwen3", "no thinking, please") else ""
        expected = [[start + len(asked_for) * (not generation), end] for start, end in golden["spans"]]
        assert spans(segments) == expected, title


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_loss_are_those_of_transformers(tmp_path, family):
    template, directory = template_of(tmp_path, family, True), models.STORIES260K
    codec = Codec(models.load_tokenizer(directory), read_config(directory), directory)
    for title, golden in GOLDEN["tokens"][family].items():
        row = Row({"messages": CONVERSATIONS[title]["messages"]}, "a.jsonl", 1)
        example = encode_language([row], codec, lambda: template, "text", 10_000)[0]
        tokens, weights = [*example.tokens[:1], *example.targets], [0, *example.weights]
        ended = family == "mistral"  # The others end an answer by what this tokenizer has no token for.
        assert tokens == golden["ids"] + [codec.end] * (not ended), title
        assert weights == golden["mask"] + [1] * (not ended), title


@pytest.mark.parametrize("title", FOLDERS)
def test_the_template_and_the_special_tokens_are_those_that_transformers_reads(tmp_path, title):
    write_folder(tmp_path / "model", FOLDERS[title])
    template = chat.template("auto", tmp_path / "model", {})
    for tools, text in zip((None, TOOLS), GOLDEN["folders"][title]):
        more = {"tools": tools} if tools else {}
        if text is not None:
            assert template.render(said(("user", "Q")), **more) == text
            continue
        with pytest.raises(ValueError, match="the model has the chat templates tool_use but none called default"):
            template.render(said(("user", "Q")), **more)
