"""The command line, `jlora COMMAND`: finetune, data, inspect, plan, merge, generate, chat, serve, eval, export and more.

What a user got wrong is told in one sentence, with exit code 2; `--traceback` shows where it came from. A training that
diverged, or made the model worse, ends with exit code 3, and so does a plan that does not fit.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Sequence

from jlora.compose.combine import COMBINATIONS
from jlora.compose.election import MAJORITIES
from jlora.training.errors import DivergenceError, LostError, SettingError
from jlora.training.hosts.versions import installed
from jlora.training.settings.flags import Parser, add_flags, number

_EXAMPLES = """examples:
  jlora finetune                                    the shipped model on Python's documentation
  jlora finetune --model DIR --data chat.jsonl --rank 16 --epochs 2 --out run
  jlora finetune --method adalora --set target=4 --set orthogonality=0.1
  jlora finetune --model DIR --data train.tsv --task classify --text-column sentence --validation dev.tsv
  jlora finetune --sweep learning-rate=1e-3,3e-3 --seeds 5   ten runs at once, and a page that compares them
  jlora finetune --model DIR --data pairs.jsonl --task preference --beta 0.1
  jlora finetune --out run --resume                 go on after a stop, with the run's own settings
  jlora finetune --model DIR --adapter run --data more.jsonl --out run2   a new run that starts with trained adapters
  jlora data chat.jsonl --model DIR                 how rows are read, what is learned, and a proposal for --max-length
  jlora inspect --method adalora --steps 2000       what a method is, and its hyperparameters
  jlora inspect --model DIR --targets '.*/(q|v)_proj/kernel'
  jlora plan --model DIR --mesh fsdp=4,tensor=2 --device v5e --rank 16 --batch 8 --length 1024
  jlora chat run_a run_b                            /adapter run_b switches
  jlora serve --model DIR --adapters runs           OpenAI's API at http://127.0.0.1:8000, and a page
  jlora compare run_a run_b --to compared.html
  jlora merge run merged_model
  jlora export run --to adapter --profile serving
  jlora import adapter --model DIR --to run
  jlora merge-adapters style facts --weights 0.8,1 --to both
"""

_COUNT = number(int, lambda value: value >= 1, "at least 1")


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser("jlora", description="Parameter-efficient fine-tuning for JAX.", epilog=_EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    versions = f"jlora {installed('jlora')}, JAX {installed('jax')}, Python {platform.python_version()}"
    parser.add_argument(
        "--version", action="version", version=versions, help="show jlora's, JAX's and Python's, and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    everything = ("model", "data", "method", "training", "run")
    finetune = commands.add_parser("finetune", help="train adapters for a model", epilog=_EXAMPLES)
    finetune.formatter_class = argparse.RawDescriptionHelpFormatter
    add_flags(finetune, everything)
    _add_processes(finetune.add_argument_group("several processes, one command for each"))
    _add_data(commands.add_parser("data", help="show how rows are read, what is learned, and how long they are"))
    inspect = commands.add_parser("inspect", help="show what would be adapted, without training")
    add_flags(inspect, ("model", "data", "method"), also=("steps",))
    _add_plan(commands.add_parser("plan", help="show what a run would take of each chip, without weights or chips"))
    _add_merge(commands.add_parser("merge", help="write the trained model as a Hugging Face directory"))
    _add_generate(commands.add_parser("generate", help="continue a prompt"))
    _add_chat(commands.add_parser("chat", help="talk with a model, and switch between its adapters"))
    _add_serve(commands.add_parser("serve", help="answer over HTTP as OpenAI's API does, with many adapters at once"))
    _add_eval(commands.add_parser("eval", help="loss and perplexity, or accuracy, on a file"))
    _add_compare(commands.add_parser("compare", help="show finished runs side by side"))
    _add_export(commands.add_parser("export", help="write the adapters in PEFT's format"))
    _add_import(commands.add_parser("import", help="make a run of an adapter in PEFT's format"))
    _add_merge_adapters(commands.add_parser("merge-adapters", help="make one run of the adapters of several"))
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where an error came from")
        command.set_defaults(parser=command)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="FILE", help="file in a format that finetune reads, or several with commas between"
    )
    also = ("model", "preference_loss")
    add_flags(parser, ("data",), also, without=("data", "validation", "validation_fraction", "max_validation_rows"))


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", required=True, choices=("v5e", "v5p", "h100"), help="kind of the chips")
    parser.add_argument("--slices", type=_COUNT, default=1, help="slices of TPUs, over which data goes (1)")
    add_flags(
        parser, ("model", "method"), also=("max_length", "steps", "batch", "accumulate", "optimizer", "mesh", "shard")
    )
    parser.add_argument(
        "--length", dest="max_length", type=_COUNT, default=argparse.SUPPRESS, help="the same as --max-length"
    )


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--distributed", action="store_true", help="find the others as Slurm, GKE or Cloud TPU tell")
    group.add_argument("--coordinator", help="host:port of process 0, where nobody tells")
    group.add_argument("--processes", type=number(int), help="how many processes take part")
    group.add_argument("--process", type=number(int), help="number of this process, from 0")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of jlora finetune")
    parser.add_argument("directory", help="folder to write, which must not exist")
    parser.add_argument("--model", help="directory of the base, where it is no longer at its place")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="output folder of jlora finetune (default: the base alone)")
    parser.add_argument("--model", help="directory of the base (default: the run's, or the shipped model)")
    parser.add_argument("--prompt", default="", help="text to continue, or what a user says")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="write the prompt by the chat template, as what a user says (where the run was trained on chats, or the base "
        "alone has a template)",
    )
    parser.add_argument(
        "--file", help="many prompts: a text file with one a line, or rows as finetune reads them, up to their answers"
    )
    parser.add_argument("--to", metavar="FILE", help="write prompts and texts to this file as JSON lines, with --file")
    parser.add_argument("--batch", type=_COUNT, default=8, help="prompts of --file that are continued together (8)")
    _add_drawing(parser, 100)


def _add_drawing(parser: argparse.ArgumentParser, tokens: int) -> None:
    """How a text is written and where it ends; what is left open, the model's generation_config.json says."""
    parser.add_argument("--tokens", type=_COUNT, default=tokens, help=f"tokens to write, at most ({tokens})")
    temperature = number(float, lambda value: 0 <= value < float("inf"), "0 or more")
    parser.add_argument(
        "--temperature", type=temperature, help="0 takes the likeliest token each time (the model's own, or 0.7)"
    )
    parser.add_argument("--top-k", type=_COUNT, help="draw from the k likeliest tokens (the model's own, or all)")
    share = number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")
    parser.add_argument(
        "--top-p",
        type=share,
        help="draw from the likeliest tokens whose probabilities reach p (the model's own, or all)",
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end where this text is written; may be given several times"
    )
    parser.add_argument("--seed", type=number(int), default=0, help="seed of the drawing (0)")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="output folders of jlora finetune on one base (default: the base)"
    )
    parser.add_argument("--model", help="directory of the base (default: the first run's, or the shipped model)")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _add_drawing(parser, 512)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="output folders of jlora finetune on one base, called by their folders' names",
    )
    parser.add_argument("--model", help="directory of the base (default: the first run's, or the shipped model)")
    parser.add_argument(
        "--adapters",
        action="append",
        metavar="DIR",
        help="folder whose subfolders are adapters, of jlora.save, jlora finetune or in PEFT's format, or NAME=DIR for one; "
        "may be given several times; calls may load others from there",
    )
    parser.add_argument(
        "--quantize", metavar="CODE", help="keep the base's linear weights as a code: nf4, .. (the run's)"
    )
    parser.add_argument("--served-name", metavar="NAME", help="what calls name the base (the name of its folder)")
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="how chats are written where an adapter has no template of its own: model, chatml, plain, a .jinja file (model)",
    )
    parser.add_argument(
        "--trust-templates",
        action="store_true",
        help="run the chat templates in adapters' folders, which are programs; else only those of the base or of jlora",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all (127.0.0.1)")
    port = number(int, lambda value: 0 <= value < 2**16, "from 0 to 65535")
    parser.add_argument("--port", type=port, default=8000, help="port to listen at; 0 is any that is free (8000)")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with the token that calls must bring (default: the variable JLORA_TOKEN)",
    )
    parser.add_argument("--max-body", type=_COUNT, default=2, metavar="MIB", help="size of a call, at most (2)")
    parser.add_argument("--queue", type=_COUNT, default=256, help="requests that may wait (256)")
    parser.add_argument("--rows", type=_COUNT, default=8, help="requests that run at once (8)")
    parser.add_argument(
        "--length",
        type=_COUNT,
        help="tokens of a prompt and its answer together, at most (the model's positions, or 2048)",
    )
    parser.add_argument(
        "--rank", type=_COUNT, help="the largest rank of an adapter (that of the given ones, 16 at least)"
    )
    parser.add_argument(
        "--slots", type=_COUNT, default=8, help="adapters that are kept on the device besides those in use (8)"
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of jlora finetune")
    parser.add_argument("data", help="file in a format that finetune reads")
    parser.add_argument("--model", help="directory of the base, where it is no longer at its place")
    parser.add_argument("--base", action="store_true", help="without the adapters, to compare")
    parser.add_argument("--max-rows", type=_COUNT, help="on this many rows, drawn by the run's seed")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of jlora finetune")
    parser.add_argument("--to", metavar="FILE", help="write a page with table and curves to this file (.html)")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of jlora finetune, or the adapters in it")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write, which must not exist")
    parser.add_argument(
        "--profile",
        choices=("peft", "serving"),
        default="peft",
        help="peft: all that PEFT reads; serving: plain LoRA for vLLM, SGLang and llama.cpp (peft)",
    )
    parser.add_argument(
        "--svd-rank", type=_COUNT, help="turn what has no place into LoRA of at most this rank, with a loss"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the tensors (as trained)")
    parser.add_argument("--model", help="directory of the base, where it is no longer at its place")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--model", help="directory of the base (default: the shipped model)")
    parser.add_argument("--to", required=True, metavar="DIR", help="run to write, which must not exist")
    parser.add_argument(
        "--quantize", metavar="CODE", help="keep the base's linear weights as a code, as finetune has it: nf4, .."
    )


def _add_merge_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of jlora finetune on one base")
    parser.add_argument(
        "--weights", type=_numbers, required=True, metavar="W,W", help="a number for each run, as in --weights=0.8,-1"
    )
    ways = f"one of {', '.join(COMBINATIONS)} (cat, which is exact)"
    parser.add_argument("--combination", choices=COMBINATIONS, default="cat", metavar="NAME", help=ways)
    parser.add_argument("--rank", type=_COUNT, help="of the result of an svd (the largest of the runs')")
    quantile = number(float, lambda value: 0 < value <= 1, "above 0 and at most 1")
    parser.add_argument("--density", type=quantile, help="share of the entries that pruning keeps")
    parser.add_argument("--majority", choices=MAJORITIES, default="total", help="whose sign ties elects (total)")
    parser.add_argument("--clamp", type=quantile, help="clip the factors of an svd to this quantile of their entries")
    parser.add_argument("--seed", type=number(int), default=0, help="seed of dare's drawing (0)")
    parser.add_argument("--model", help="directory of the base, where it is no longer at its place")
    parser.add_argument("--to", required=True, metavar="DIR", help="run to write, which must not exist")


def _numbers(text: str) -> list[float]:
    return [number(float)(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code: 0; 2 for what the user can put right; 3 where the training diverged or made the model worse; 4 where
        Ctrl-C or SIGTERM stopped it and it can go on; 5 where another process died; 130 where Ctrl-C ended it at once.
    """
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        arguments.parser.refuse(unknown)
    if not arguments.traceback:
        _quiet_libraries()
    try:
        # Here and not above: `jlora --help` need not wait for flax, orbax and grain.
        from jlora.training.commands import actions as commands

        complaint = commands.COMMANDS[arguments.command](arguments)
    except (ValueError, TypeError, OSError) as error:
        if arguments.traceback:
            raise
        help = f" (see {arguments.parser.prog} --help)" if isinstance(error, SettingError) else ""
        print(f"jlora {arguments.command}: {sentence(error)}{help}", file=sys.stderr)
        return error.code if isinstance(error, LostError) else 3 if isinstance(error, DivergenceError) else 2
    except KeyboardInterrupt as error:
        print(f"\njlora {arguments.command}: {str(error) or 'stopped'}", file=sys.stderr)
        return getattr(error, "code", 130)
    if complaint:
        print(f"jlora {arguments.command}: {complaint}", file=sys.stderr)
    return 3 if complaint else 0


def _quiet_libraries() -> None:
    """Orbax logs the traceback of what it then raises, and asyncio what it has raised; the sentence is enough."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def sentence(error: BaseException) -> str:
    """The error's message in one line."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
