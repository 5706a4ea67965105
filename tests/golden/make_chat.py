"""Writes `chat.json`: what transformers makes of chats, for `tests/training/test_chat_golden.py`.

Run with a Python that has transformers: `python tests/golden/make_chat.py`. The templates in `chat/` are jlora's own, in the
formats of Llama 3, Qwen2.5, Qwen3, Mistral, Gemma and SmolLM2; what introduces tools and what a system says by default is in
other words than the models'.

    python tests/golden/make_chat.py FOLDER …

writes nothing and compares, on the same chats, jlora with transformers on templates of yours: each folder is that of a
tokenizer, or holds `*.jinja` files. Files called `llama3.jinja` or as another one in `chat/` are also compared with that.

So compared, with transformers 5.24: the templates of Llama 3.2, Qwen2.5, Qwen3, Mistral Nemo, Gemma and SmolLM2 (every text the
same; the texts of `chat/` too, but for tools and a system's default words), and the 53 templates in TRL's repository as of July
2026 (every text the same, and every answer where `{% generation %}` stands).
"""

import json
import sys
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path

from chat_conversations import (
    CONVERSATIONS,
    FAMILIES,
    FOLDERS,
    NOW,
    TOKENS,
    TOOLS,
    arguments,
    said,
    source,
    write_folder,
)
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from jlora.models import STORIES260K
from jlora.models.chat_files import ChatSource, read_chat_templates
from jlora.training.data.chat import Template
from jlora.training.data.chat_environment import ChatJinja

TOKENIZER = str(STORIES260K / "tokenizer.json")


class Then(datetime):
    """The day on which these chats take place."""

    @classmethod
    def now(cls, tz=None):
        return NOW


def variables():
    """The special tokens."""
    return {name: token["content"] if isinstance(token, dict) else token for name, token in TOKENS.items() if token}


def rendered(text, chat, prompt, spans=False):
    """Text and spans of transformers, or the template's refusal."""
    try:
        texts, found = chat_template_utils.render_jinja_template(
            conversations=[chat_template_utils._normalize_chat_messages(chat["messages"])],
            tools=chat.get("tools"), chat_template=text, add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans, documents=None, **variables(), **chat.get("variables", {}),
        )  # fmt: skip
    except Exception as error:
        return {"error": str(error)}
    return {"text": texts[0], **({"spans": found[0]} if spans else {})}


def family_cases(family):
    for name, chat in CONVERSATIONS.items():
        plain, marked = rendered(source(family, False), chat, False), rendered(source(family, True), chat, False, True)
        assert plain.get("text") == marked.get("text"), (family, name)
        yield name, {**marked, "prompt": rendered(source(family, False), chat, True).get("text")}


def folder_case(files, tools):
    with tempfile.TemporaryDirectory() as place:
        write_folder(Path(place) / "model", files)
        (Path(place) / "model" / "tokenizer.json").write_bytes(Path(TOKENIZER).read_bytes())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(place) / "model")
        try:
            return tokenizer.apply_chat_template(said(("user", "Q")), tools=tools, tokenize=False)
        except ValueError:
            return None


def token_cases(family):
    """Ids and masks, by the tokenizer that comes with jlora."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=TOKENIZER, bos_token="<s>", eos_token="</s>")
    for name in ("letters, tags and blanks", "reasoning in the text"):
        found = tokenizer.apply_chat_template(
            CONVERSATIONS[name]["messages"], chat_template=source(family, True), return_assistant_tokens_mask=True
        )
        yield name, {"ids": found["input_ids"], "mask": found["assistant_masks"]}


def write():
    golden = {
        "chats": {family: dict(family_cases(family)) for family in FAMILIES},
        "folders": {name: [folder_case(files, tools) for tools in (None, TOOLS)] for name, files in FOLDERS.items()},
        "tokens": {family: dict(token_cases(family)) for family in FAMILIES},
    }
    path = Path(__file__).with_name("chat.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def compare(folder):
    """Prints for each template in a folder how many chats jlora writes as transformers does, and what is not the same."""
    found = read_chat_templates(folder) or {
        path.stem: ChatSource(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(Path(folder).glob("*.jinja"))
    }
    for name, template in found.items():
        mine = Template(name, {"default": ChatJinja(template, NOW)}, variables())
        counts, notes = Counter(), []
        for title, chat in CONVERSATIONS.items():
            for said_of in (
                *texts(mine, template, chat),
                answers(mine, template, chat),
                own_text(name, template, chat),
            ):
                counts[said_of.partition(":")[0]] += 1
                notes += [f"{title}: {said_of}"] if ":" in said_of else []
        print(f"{folder} {name}: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
        print(*(f"    {note}" for note in notes), sep="\n")


def texts(mine, template, chat):
    """Without the header of an answer and with it."""
    for prompt in (False, True):
        golden = rendered(template.text, chat, prompt)
        try:
            text = mine.render(chat["messages"], prompt, **arguments(chat))
        except ValueError as error:
            yield "texts that both refuse" if "error" in golden else f"TEXTS REFUSED: {error}"
            continue
        yield "equal texts" if text == golden.get("text") else f"TEXTS THAT DIFFER: {text!r} {golden!r}"


def answers(mine, template, chat):
    """The assistant's text: by the template's own blocks, or as jlora finds it."""
    golden = rendered(template.text, chat, False, True)
    try:
        found = [text for text, answer in mine(chat["messages"], **arguments(chat)) if answer]
    except ValueError as error:
        return "answers of texts that both refuse" if "error" in golden else f"chats refused: {error}"
    if not mine.sources["default"].marks:
        return f"answers found: {found}"
    marked = [golden["text"][a:b] for a, b in golden["spans"] if a < b]
    return "equal answers" if found == marked else f"ANSWERS THAT DIFFER: {found} {marked}"


def own_text(name, template, chat):
    """Whether the template of that name in `chat/` gives the same text, once a system's words are given."""
    if name not in FAMILIES or "error" in rendered(template.text, chat, False):
        return "not compared with chat/"
    opened = {**chat, "messages": [*said(("system", "Be kind.")), *chat["messages"]]}
    same = any(
        "text" in rendered(template.text, one, False)
        and rendered(template.text, one, False) == rendered(source(name, False), one, False)
        for one in (chat, opened)
    )
    return "texts equal to those of chat/" if same else "texts that chat/ words otherwise"


if __name__ == "__main__":
    chat_template_utils.datetime = Then
    for folder in sys.argv[1:]:
        compare(folder)
    if not sys.argv[1:]:
        write()
