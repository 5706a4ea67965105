"""Texts of `jlora generate` and `jlora chat`: where they end, how prompts become tokens, and adapters by name."""

import json
import shutil
from types import SimpleNamespace

import jax
import pytest

import jlora
from jlora import models
from jlora.training.cli import main
from jlora.training.commands import writing
from jlora.training.commands.actions import _base
from jlora.training.commands.chatting import Conversation
from jlora.training.commands.writing import Writer, prompt_tokens, read_prompts, template_of, way_of
from jlora.training.data.tokens import Codec
from jlora.training.errors import DataError

pytestmark = pytest.mark.once

OPEN = dict.fromkeys(("temperature", "top_k", "top_p", "stop")) | {"tokens": 6, "seed": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The shipped model as one that knows chats."""
    folder = shutil.copytree(models.STORIES260K, tmp_path_factory.mktemp("model") / "chatty")
    template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    config = {"eos_token_id": [2, 13], "stop_strings": ["END"], "do_sample": True, "top_k": 4, "min_p": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(directory):
    return _base(str(directory))


def test_the_model_says_how_it_is_sampled_and_the_user_over_it(base):
    way, notes = way_of(base, OPEN)
    assert (way.temperature, way.top_k, way.top_p, way.ends, way.stop) == (1.0, 4, None, (2, 13), ("END",))
    assert notes == ["generation_config.json has min_p=0.1, which is not followed"]
    way, _ = way_of(base, OPEN | {"temperature": 0.0, "top_k": 9, "stop": ["\n"]})
    assert (way.temperature, way.top_k, way.stop) == (0.0, 9, ("END", "\n"))


def test_a_prompt_is_what_a_user_says_where_the_model_has_chats(base):
    codec = base.subject.codec
    text = "<s>user: hi\n<s>assistant:"
    wanted = codec.tokenizer.encode(text, add_special_tokens=False).ids
    assert prompt_tokens(base, "hi", None) == prompt_tokens(base, [{"role": "user", "content": "hi"}], None) == wanted
    assert prompt_tokens(base, "hi", False) == codec.prompt("hi") != wanted
    # A run that was trained on texts continues texts, whatever its base knows.
    trained = SimpleNamespace(template=None, adapted=object(), directory=base.directory)
    assert template_of(trained) is None


def written_by(monkeypatch, base, texts, **way):
    """A writer whose model draws the tokens of a text, ended as the way says."""
    codec: Codec = base.subject.codec
    ids = [codec.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(writing.models, "stream", lambda *given, **options: iter(ids[0]))
    monkeypatch.setattr(writing.models, "generate", lambda *given, **options: ids)
    return Writer(base, way_of(base, OPEN | way)[0], {"run": None}, "run")


@pytest.mark.parametrize("stop", [[], ["and then"], ["dog. A"], ["x"]])
def test_a_text_ends_where_it_is_told_to_and_pieces_are_the_whole(base, monkeypatch, stop):
    text = "a big dog. And then a cat ran and then slept"
    writer = written_by(monkeypatch, base, [text, text], stop=stop)
    prompt = base.subject.codec.prompt("I saw")
    wanted = text
    for each in stop:
        wanted = wanted.partition(each)[0]
    pieces = list(writer.pieces(prompt))
    assert "".join(pieces).strip() == wanted.strip() and len(pieces) > 2
    assert [each.strip() for each in writer.texts([prompt, prompt])] == [wanted.strip()] * 2


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(base, monkeypatch):
    pieces = list(written_by(monkeypatch, base, ["é ü 中"]).pieces(base.subject.codec.prompt("I")))
    assert "".join(pieces).split() == ["é", "ü", "中"] and not any("�" in piece for piece in pieces)


def test_prompts_of_a_file_are_its_lines_or_what_stands_before_the_answers(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(str(tmp_path / "p.txt"), None) == ["one", "two"]
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    rows = [
        {"prompt": "p", "completion": "c"},
        {"messages": [user, answer]},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"instruction": "hi", "input": " ", "output": "x"},
        {"prompt": [user]},
        {"text": "t"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(str(tmp_path / "p.jsonl"), None) == ["p", [user], [user], [user], [user], "t"]
    (tmp_path / "q.jsonl").write_text('{"question": "hi"}\n')
    with pytest.raises(DataError, match="q.jsonl:1: there is no 'text'"):
        read_prompts(str(tmp_path / "q.jsonl"), None)


def test_generate_streams_one_prompt_and_writes_many_as_json_lines(tmp_path, capsys):
    given = ["--tokens", "6", "--temperature", "0"]
    assert main(["generate", "--prompt", "Once upon", *given]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("Once upon a time")
    (tmp_path / "p.txt").write_text("Once upon\nThe dog\n")
    many = ["generate", "--file", str(tmp_path / "p.txt"), "--to", str(tmp_path / "out.jsonl"), *given]
    assert main(many) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon", "The dog"]
    assert f"Once upon{rows[0]['completion']}\n" == alone
    assert main(many) == 2 and "exists already" in capsys.readouterr().err
    assert main([*many[:3], "--prompt", "x"]) == 2
    assert "--prompt is one text: give it, or --file with many" in capsys.readouterr().err


def test_a_conversation_has_turns_a_system_message_and_adapters_by_name(base):
    shown = []
    spec = {".*/q_proj/kernel": jlora.LoRA(rank=2)}
    sites = jlora.sites(base.subject.forward, base.subject.params, small_batch())
    adapted = jlora.adapterize(base.subject.params, spec, sites=sites)
    moved = adapted.replace(params=jax.tree.map(lambda leaf: leaf + 0.5, adapted.params))
    way = way_of(base, OPEN | {"temperature": 0.0, "tokens": 4})[0]
    talk = Conversation(Writer(base, way, {"style": moved, "base": None}, "style"), shown.append)

    def said(line):
        shown.clear()
        assert talk.turn(line)
        return "".join(shown).rstrip("\n")

    first = said("hi")
    assert [each["role"] for each in talk.messages] == ["user", "assistant"]
    assert said("/adapter") == "* style\n  base"
    assert said("/adapter stile") == "there are no adapters stile; did you mean style?"
    said("/undo"), said("/adapter base")
    assert talk.messages == [] and said("hi") != first
    said("/system be brief"), said("hi")
    assert [each["role"] for each in talk.messages] == ["system", "user", "assistant"]
    said("/new")
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    assert "did you mean /exit?" in said("/exi") and "/undo" in said("/help")
    assert not talk.turn("/exit")


def small_batch():
    shape = jax.ShapeDtypeStruct((1, 8), "int32")
    return {"tokens": shape, "positions": shape, "segment_ids": shape}
