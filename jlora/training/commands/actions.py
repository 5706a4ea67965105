"""What each command does."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import jlora
from jlora.training.commands.chatting import Conversation, adapters_of
from jlora.training.commands.combined import combine_runs
from jlora.training.commands.exchange import export_run, import_adapter, open_run_or_adapters
from jlora.training.commands.runs import Run, evaluate_file, open_run, write_merged
from jlora.training.commands.writing import Writer, prompt_tokens, read_prompts, way_of
from jlora.training.data.formats.mixture import read_files
from jlora.training.errors import SettingError, Stopped
from jlora.training.files import write_whole
from jlora.training.folder import check_new
from jlora.training.hosts import processes
from jlora.training.job import finetune
from jlora.training.model.selection import trace_sites
from jlora.training.model.subject import abstract_subject, known_formats, model_directory, open_codec
from jlora.training.reporting.compare import comparison_page, comparison_text
from jlora.training.run.continued import check_labels, shown_adapters, source_of
from jlora.training.run.record import SETTINGS, read_settings
from jlora.training.settings.configuration import Given
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings
from jlora.training.settings.flags import given
from jlora.training.settings.inspected import settings_table
from jlora.training.settings.sweeps import is_sweep
from jlora.training.sweep.job import sweep


def _finetune(arguments: argparse.Namespace) -> str | None:
    """Returns what is wrong with the result, if anything."""
    processes.join(arguments.distributed, arguments.coordinator, arguments.processes, arguments.process)
    with processes.together():
        asked = given(arguments)
        settings = asked.settings(_stored(asked))
        try:
            with _as_written(asked):
                return sweep(settings).complaint if is_sweep(settings) else finetune(settings).complaint
        except Stopped:
            raise
        except KeyboardInterrupt as error:
            if (Path(settings.out) / SETTINGS).exists():
                raise KeyboardInterrupt(f"stopped; jlora finetune --out {settings.out} --resume goes on") from error
            raise


@contextlib.contextmanager
def _as_written(asked: Given) -> Iterator[None]:
    """Errors about settings have the names that the user wrote."""
    try:
        yield
    except SettingError as error:
        raise error.renamed(asked.names.get(error.setting, "--" + error.setting.replace("_", "-"))) from error


def _stored(asked: Given) -> dict[str, Any]:
    """The settings that a run to resume was started with; what is given now is compared with them later."""
    if not asked.values.get("resume"):
        return {}
    out = asked.values.get("out", Settings.out)
    if not (Path(out) / SETTINGS).exists():
        return {}  # the job says what is wrong with the folder
    stored = read_settings(out)["asked"]
    if "mesh" in asked.values:  # the rules of a run are for its mesh
        stored.pop("shard", None)
    return stored


def _inspect(arguments: argparse.Namespace) -> None:
    asked = given(arguments)
    with _as_written(asked):
        print(_inspected(resolve(asked.settings())))


def _inspected(settings: Settings) -> str:
    """How the model reads its weights, what would be trained, what the methods are, and what can be set."""
    codec, config = open_codec(settings)
    source = source_of(settings)
    labels = (source and source.about.get("labels")) or ["0", "1"]
    if settings.task == "classify" and settings.data is not None:
        from jlora.training.data.encode import label_names

        labels = label_names(read_files(settings.data, settings.format), settings.label_column)
        check_labels(source, labels)
    # Saved adapters are of a base in one format; of new ones no format is shown.
    formats = None if source is None else known_formats(settings, config)[0]
    subject = abstract_subject(settings, codec, config, labels, formats)
    sites = trace_sites(subject, settings)
    adapted = shown_adapters(subject, settings, sites)
    parts = {
        "how the model reads its weights": sites,
        "what would be trained": jlora.summary(adapted),
        "what the methods are": jlora.explain(adapted),
        "their hyperparameters, by --set NAME=VALUE or the flag in brackets": settings_table(settings),
    }
    told = [f"{title}:\n{text}" for title, text in parts.items() if str(text)]
    return "\n\n".join([f"model {subject.directory}", *told])


def _data(arguments: argparse.Namespace) -> None:
    from jlora.training.commands.shown import shown

    asked = given(arguments)
    with _as_written(asked):
        print(shown(resolve(asked.settings())))


def _plan(arguments: argparse.Namespace) -> str | None:
    """Returns that the run does not fit, if that is known."""
    from jlora.training.commands import plan
    from jlora.training.commands.chips import CHIPS, stay_off_chips

    stay_off_chips()
    asked = given(arguments)
    with _as_written(asked):
        made = plan.make_plan(resolve(asked.settings()), CHIPS[arguments.device], arguments.slices)
        text, large = plan.report(made)
    print(text)
    return f"does not fit into the memory of {arguments.device}" if large else None


def _merge(arguments: argparse.Namespace) -> None:
    check_new(arguments.directory)  # before a large model is read
    run = open_run(arguments.run, arguments.model)
    write_merged(run, arguments.directory)
    print(f"merged model written to {arguments.directory}")


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.to is not None and Path(arguments.to).exists():
        raise FileExistsError(f"{arguments.to} exists already; choose a new file")
    if (arguments.to is not None or arguments.file is not None) and arguments.prompt:
        raise SettingError("--prompt", "is one text: give it, or --file with many")
    asked = None if arguments.file is None else read_prompts(arguments.file, None)
    writer = _writer(open_run(arguments.run, arguments.model) if arguments.run else _base(arguments.model), arguments)
    run = writer.run
    if asked is not None:
        _write_many(writer, asked, arguments)
        return
    prompt = prompt_tokens(run, arguments.prompt, arguments.chat)
    # As it is written, and what it continues; of a chat the answer alone.
    told = (arguments.prompt and prompt == run.subject.codec.prompt(arguments.prompt)) or not arguments.prompt
    print(run.subject.codec.decode(prompt) if told else "", end="", flush=True)
    for piece in writer.pieces(prompt):
        print(piece, end="", flush=True)
    print()


def _writer(run: Run, arguments: argparse.Namespace, adapters: dict[str, Any] | None = None) -> Writer:
    """Writes with a run's model as the user says, with notes on what the model's files say otherwise."""
    if run.settings.task == "classify":
        raise ValueError(f"{arguments.run} is a classifier: it cannot continue a text")
    way, notes = way_of(run, vars(arguments))
    for note in notes:
        print(f"note  {note}", file=sys.stderr)
    adapters = {"run": run.adapted} if adapters is None else adapters
    return Writer(run, way, adapters, next(iter(adapters)))


def _write_many(writer: Writer, asked: Sequence[Any], arguments: argparse.Namespace) -> None:
    """The texts after many prompts as JSON lines, with the prompts."""
    tokens = [prompt_tokens(writer.run, each, arguments.chat) for each in asked]
    lines = []
    for start in range(0, len(asked), arguments.batch):
        part = slice(start, start + arguments.batch)
        for prompt, text in zip(asked[part], writer.texts(tokens[part])):
            lines.append(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) + "\n")
            if arguments.to is None:
                print(lines[-1], end="", flush=True)
    if arguments.to is not None:
        write_whole(arguments.to, "".join(lines))
        print(f"{len(lines):,} texts written to {arguments.to}")


def _chat(arguments: argparse.Namespace) -> None:
    run = open_run(arguments.runs[0], arguments.model) if arguments.runs else _base(arguments.model)
    arguments.run = arguments.runs[0] if arguments.runs else None
    writer = _writer(run, arguments, adapters_of(arguments.runs, run))

    def show(text: str) -> None:
        print(text, end="", flush=True)

    conversation = Conversation(writer, show)
    names = ", ".join(writer.adapters)
    print(f"{run.directory}, answers by {writer.current} of {names}; /help lists what else there is")
    if arguments.system:
        conversation.turn(f"/system {arguments.system}")
    while True:
        try:
            if not conversation.turn(input("> ")):
                return
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(stopped; /exit leaves)")


def _serve(arguments: argparse.Namespace) -> None:
    from jlora.training.commands.serving import serve

    serve(arguments)


def _base(model: str | None) -> Run:
    """A model without adapters."""
    from jlora.training.model.subject import load_subject

    settings = resolve(Settings(model=model))
    return Run(settings, load_subject(settings, *open_codec(settings)), None, model_directory(settings))


def _eval(arguments: argparse.Namespace) -> None:
    run = open_run(arguments.run, arguments.model)
    values = evaluate_file(run, arguments.data, arguments.max_rows, base=arguments.base)
    print(", ".join(f"{name} {value:.4f}" for name, value in values.items()))


def _compare(arguments: argparse.Namespace) -> None:
    if arguments.to is not None and Path(arguments.to).exists():
        raise FileExistsError(f"{arguments.to} exists already; choose a new file")
    print(comparison_text(arguments.runs))
    if arguments.to is not None:
        write_whole(arguments.to, comparison_page(arguments.runs))
        print(f"page written to {arguments.to}")


def _export(arguments: argparse.Namespace) -> None:
    check_new(arguments.to)
    run = open_run_or_adapters(arguments.run, arguments.model)
    print(export_run(run, arguments.to, arguments.profile, arguments.svd_rank, arguments.dtype))
    print(f"adapter written to {arguments.to}")


def _import(arguments: argparse.Namespace) -> None:
    adapted = import_adapter(arguments.adapter, arguments.model, arguments.to, arguments.quantize, print)
    print(jlora.summary(adapted))
    print(f"run written to {arguments.to}")


def _merge_adapters(arguments: argparse.Namespace) -> None:
    key = jax.random.key(arguments.seed)
    options = {name: getattr(arguments, name) for name in ("combination", "rank", "clamp", "density", "majority")}
    combined = combine_runs(arguments.runs, arguments.weights, arguments.to, arguments.model, key=key, **options)
    print(jlora.summary(combined))
    print(f"run written to {arguments.to}")


COMMANDS = {
    "finetune": _finetune,
    "data": _data,
    "inspect": _inspect,
    "plan": _plan,
    "merge": _merge,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "eval": _eval,
    "compare": _compare,
    "export": _export,
    "import": _import,
    "merge-adapters": _merge_adapters,
}
