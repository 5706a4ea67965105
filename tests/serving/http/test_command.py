"""`jlora serve`: which adapters a command line names, what it refuses, and a process that is told to end, or killed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from over_http import ask, until

import jlora
from jlora.models import STORIES260K
from jlora.models.chat_files import write_chat_templates
from jlora.serving.http.run import is_local
from jlora.training.cli import build_parser, main
from jlora.training.commands import serving
from jlora.training.commands.serving import RunVoice, find_adapters, open_base, read_token
from jlora.training.data.chat import template
from jlora.training.errors import CheckpointError, SettingError

pytestmark = pytest.mark.once

PROMPT = {"model": "sql", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}


def test_a_folder_names_the_adapters_in_it_and_a_run_or_a_pair_names_one(folders):
    found = find_adapters([], [str(folders)])
    assert found.adapters == {name: folders / name for name in ("peft", "sql", "talk")}
    assert found.roots == (folders,) and found.notes == (f"{folders / 'notes'} holds no adapters: left out",)
    found = find_adapters([str(folders / "sql")], [f"other={folders / 'sql'}", str(folders / "talk")])
    assert list(found.adapters) == ["sql", "other", "talk"]
    # A call may load from where the command line says adapters are, not from where a run alone is.
    assert found.roots == (folders / "sql", folders / "talk")


def test_what_is_no_adapter_or_has_the_name_of_another_is_refused(folders, tmp_path):
    for runs, given, kind, words in (
        ([], [str(tmp_path / "gone")], SettingError, "gone: no such folder"),
        ([str(tmp_path / "gone")], [], FileNotFoundError, "gone: no such folder"),
        ([str(folders / "notes")], [], CheckpointError, "notes holds no adapters"),
        ([], [f"x={folders / 'notes'}"], CheckpointError, "notes holds no adapters"),
        ([str(folders / "sql")], [str(folders)], SettingError, "are both called sql: say --adapters NAME="),
    ):
        with pytest.raises(kind, match=words):
            find_adapters(runs, given)


def as_run(folder, source, **settings):
    """A run's folder around saved adapters."""
    (folder / "adapters").parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, folder / "adapters")
    about = {"settings": {"model": None, **settings}, "labels": [], "asked": {}}
    (folder / "settings.json").write_text(json.dumps(about))
    return folder


def test_a_classifier_is_left_out_of_a_folder_and_refused_by_name(trained, tmp_path):
    jlora.save(tmp_path / "saved", trained.make(4, 1))
    run = as_run(tmp_path / "runs" / "stars", tmp_path / "saved")
    (run / "settings.json").write_text(json.dumps({"settings": {}, "labels": ["bad", "good"], "asked": {}}))
    assert find_adapters([], [str(tmp_path / "runs")]).notes == (f"{run} is a classifier: left out",)
    with pytest.raises(CheckpointError, match="stars is a classifier: it cannot write"):
        find_adapters([str(run)], [])


def test_the_base_is_that_of_the_first_run_as_it_was_trained_on_it(trained, tmp_path):
    jlora.save(tmp_path / "saved", trained.make(4, 1))
    run = as_run(tmp_path / "runs" / "one", tmp_path / "saved", model=str(STORIES260K), dtype="bfloat16")
    found = find_adapters([], [str(tmp_path / "runs")])
    assert open_base(found, None, None).settings.dtype == "bfloat16"
    assert open_base(find_adapters([], []), None, None).settings.dtype is None
    write_chat_templates(run, {"default": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    voice = RunVoice(open_base(found, None, None), trusts=True)
    assert voice.chat(None) is None
    ids = voice.chat(str(run))([{"role": "user", "content": "a dog"}])
    assert voice.decode(ids).strip() == "a dog"
    # And by the folder of the adapters alone.
    assert voice.chat(str(run / "adapters"))([{"role": "user", "content": "a dog"}]) == ids


ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize("text", ["{{ 'a' * 10**10 }}", ENDLESS, "{% broken"])
def test_a_template_of_an_adapter_is_not_even_compiled_unless_it_is_known(tmp_path, text):
    """Jinja reckons constants when it compiles, and nothing ends a loop in a thread."""
    base = open_base(find_adapters([], []), None, None)
    (tmp_path / "plain").mkdir(), (tmp_path / "own").mkdir()
    for voice in (RunVoice(base), RunVoice(base, "plain")):
        write_chat_templates(tmp_path / "own", {"default": text})
        assert voice.chat(str(tmp_path / "own")) is None
        # The text of the base's template, or of one of jlora's own, is run wherever it lies.
        write_chat_templates(tmp_path / "plain", template("plain", base.directory, {}).texts())
        ids = voice.chat(str(tmp_path / "plain"))([{"role": "user", "content": "a dog"}])
        assert voice.decode(ids).endswith("a dog\nAssistant:")
    trusting = RunVoice(base, trusts=True)
    write_chat_templates(tmp_path / "own", {"default": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    assert trusting.chat(str(tmp_path / "own")) is not None


def test_odd_names_templates_and_many_end_tokens_are_told_at_the_start(folders, tmp_path):
    model = shutil.copytree(STORIES260K, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 42))}))
    odd = shutil.copytree(folders / "sql", os.fsdecode(bytes(tmp_path / "runs") + b"/bad\xff"))
    shutil.copytree(folders / "talk", tmp_path / "runs" / "talk")
    notes = []
    words = ["serve", "--model", str(model), "--adapters", str(tmp_path / "runs"), "--length", "32"]
    service = serving.service_of(build_parser().parse_args(words), notes.append)
    assert [entry.name for entry in service.shelf.entries] == ["model", "talk"]
    assert any(repr(str(odd)) in note and "NAME=DIR is wanted: left out" in note for note in notes)
    assert any("talk has a chat template of its own" in note and "--trust-templates" in note for note in notes)
    assert service.shelf.find("talk").chat is None
    assert len(service.voice.ends) == 40
    service.engine.submit([1], max_new_tokens=1, listen=print, ends=service.voice.ends)
    with pytest.raises(SettingError, match="name must be printable"):
        find_adapters([], [f"a\nb={folders / 'sql'}"])
    service.engine.close(drain=False)


def test_a_template_that_writes_the_time_writes_that_of_the_call(tmp_path, monkeypatch):
    (tmp_path / "now.jinja").write_text("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    voice = RunVoice(open_base(find_adapters([], []), None, None), str(tmp_path / "now.jinja"))
    chat = voice.chat(None)

    class Later(serving.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2199, 1, 1)

    monkeypatch.setattr(serving, "datetime", Later)
    assert voice.decode(chat([{"role": "user", "content": " dog"}])).strip() == "2199 dog"


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(serving.TOKEN, raising=False)
    assert read_token(None) is None
    (tmp_path / "token").write_text("s3cret\n")
    assert read_token(str(tmp_path / "token")) == "s3cret"
    monkeypatch.setenv(serving.TOKEN, "other")
    assert read_token(None) == "other" and read_token(str(tmp_path / "token")) == "s3cret"
    for wrong in ("", "two words", "é"):
        (tmp_path / "token").write_text(wrong)
        with pytest.raises(SettingError, match="--token-file must hold a token"):
            read_token(str(tmp_path / "token"))


def test_only_loopback_is_local():
    assert [is_local(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4


def test_the_command_says_in_a_sentence_what_is_wrong(folders, capsys, monkeypatch):
    def told(*words):
        assert main(["serve", "--port", "0", *words]) == 2
        return capsys.readouterr().err

    assert "gone: no such folder" in told("--adapters", str(folders / "gone"))
    assert "Try" not in told("--model", str(folders)) and "Traceback" not in told("--model", str(folders))
    assert "length: wanted 2 to 512 tokens" in told("--length", "600")
    assert "sql" in (text := told("--adapters", str(folders), "--rank", "2")) and "rank 4" in text
    assert "two of what is served are called 'sql'" in told("--adapters", str(folders), "--served-name", "sql")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"can't listen at 127.0.0.1:{port}" in told("--port", str(port))
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    assert "needs the package starlette: pip install 'jlora[serve]'" in told()


class Process:
    """A server of its own process, killed at the end."""

    def __init__(self, *words, **environment):
        command = [sys.executable, "-m", "jlora.training.cli", "serve", "--rows", "2", "--length", "320", *words]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.said = self.process.stdout.readline()
        found = re.search(r"at http://(\S+) ", self.said)
        assert found, self.process.stderr.read()
        self.address = found[1]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()


@pytest.mark.long
def test_a_process_drains_when_it_is_told_to_end_and_one_that_was_killed_starts_again(folders, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    words = ("--adapters", str(folders), "--served-name", "tiny", "--token-file", str(tmp_path / "token"))
    head = {"Authorization": "Bearer s3cret"}
    with Process(*words, "--port", "0") as first:
        assert first.said == f"serves tiny with peft, sql, talk, at http://{first.address} (Ctrl-C ends it)\n"
        assert ask(first.address, "/v1/models").status == 401
        answer = ask(first.address, "/v1/completions", PROMPT, headers=head).body["choices"]
        with ThreadPoolExecutor() as pool:
            long = PROMPT | {"max_tokens": 300, "temperature": 1.5, "seed": 3, "n": 4, "stop": ["never written"]}
            begun = pool.submit(ask, first.address, "/v1/completions", long, headers=head)
            until(lambda: ask(first.address, "/metrics", headers=head).body.count(b"jlora_requests_running 2.0"))
            first.process.send_signal(signal.SIGKILL)
            assert begun.exception(30) is not None
    port = first.address.rpartition(":")[2]
    with Process(*words, "--port", port) as second:
        assert second.address == first.address
        assert ask(second.address, "/v1/completions", PROMPT, headers=head).body["choices"] == answer
        client = openai.OpenAI(base_url=f"http://{second.address}/v1", api_key="s3cret", max_retries=0)
        stream = client.completions.create(**long, stream=True)
        next(stream)
        second.process.send_signal(signal.SIGTERM)
        until(lambda: ask(second.address, "/health").status == 503)
        refused = ask(second.address, "/v1/completions", PROMPT, headers=head)
        assert refused.status == 503 and refused.body["error"]["code"] == "draining"
        reasons = [choice.finish_reason for piece in stream for choice in piece.choices if choice.finish_reason]
        assert len(reasons) == 4 and set(reasons) <= {"length", "stop"}
        assert second.process.wait(30) == 0
        assert re.match(r"ends after \d+ running and \d+ waiting requests", second.process.stdout.read())
        assert "Traceback" not in second.process.stderr.read()


@pytest.mark.long
def test_a_second_signal_ends_a_process_at_once(folders):
    with Process("--adapters", str(folders), "--port", "0", "--served-name", "tiny", JLORA_TOKEN="t") as server:
        long = PROMPT | {"max_tokens": 300, "n": 64, "temperature": 1.5, "stop": ["never written"]}
        with ThreadPoolExecutor() as pool:
            begun = pool.submit(ask, server.address, "/v1/completions", long, headers={"Authorization": "Bearer t"})
            metrics = {"headers": {"Authorization": "Bearer t"}}
            until(lambda: ask(server.address, "/metrics", **metrics).body.count(b"jlora_requests_running 2.0"))
            server.process.send_signal(signal.SIGINT)
            until(lambda: ask(server.address, "/health").status == 503)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(30) == 0
            assert begun.exception(30) is not None or begun.result().status >= 500
