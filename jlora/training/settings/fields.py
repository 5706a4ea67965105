"""Every setting of the fine-tuning job, in one frozen dataclass.

The command line's flags, the keys of a TOML file and the fields of `Settings` are the same names: flags are made from
the fields (`jlora.training.settings.flags`), and a TOML file is checked against them (`jlora.training.settings.configuration`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from jlora.core.protocol.job import Recipe
from jlora.disk import catalog
from jlora.stored.names import NAMES
from jlora.training.errors import SettingError, nearest
from jlora.training.settings import scored, told
from jlora.training.settings.axes import check_axes, mesh_axes, shard_rules
from jlora.training.settings.hyperparameters import check_names
from jlora.training.settings.sweeps import SWEPT, check_sweep
from jlora.training.settings.told import PROBE

#: What `--report-to` may name, and the package that it needs.
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
CHAT_TEMPLATES = ("auto", "model", "chatml", "plain")


def _setting(
    default: Any,
    help: str | Callable[[], str],
    *,
    group: str,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
    resumable: bool = False,
) -> Any:
    """A field with its help text; `resumable` marks what may change when a run is resumed.

    Help and choices that follow from the methods there are come as functions (see `metadata_of`).
    """
    metadata = {"help": help, "group": group, "choices": choices, "resumable": resumable}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def metadata_of(field: dataclasses.Field, name: str) -> Any:
    """The help or the choices of a field of `Settings`."""
    found = field.metadata[name]
    return found() if callable(found) else found


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a fine-tuning run does. `None` means that the job chooses (see `jlora.training.settings.defaults`).

    Raises:
        SettingError: a ValueError that names the setting, when a value or a combination makes no sense.
    """

    model: str | None = _setting(
        None,
        "directory of a Hugging Face model, a GGUF file, or smollm2 (default: the shipped 260K-parameter Llama)",
        group="model",
    )
    dtype: str | None = _setting(
        None,
        "number format of the base and its computation (that of the model's files: bfloat16 stays so, float16 is kept and "
        "computed in float32)",
        group="model",
        choices=("float32", "bfloat16"),
    )
    quantize: str | None = _setting(
        None,
        told.quantize_help,
        group="model",
        choices=lambda: tuple(NAMES),
    )
    follow_links: bool = _setting(
        False, "read model files that are links out of the model's directory", group="model", resumable=True
    )
    scan_layers: bool = _setting(True, "stack equal layers and scan over them, where the model can", group="model")
    remat: bool = _setting(False, "recompute activations in the backward pass to save memory", group="model")

    data: str | None = _setting(
        None,
        "training file: .txt, .jsonl, .json, .csv, .tsv (also with .gz), .parquet or .arrow; or several with commas between "
        "(default: Python's own documentation)",
        group="data",
    )
    weights: str | None = _setting(
        None, "shares of several files in the rows, such as 0.7,0.3 (all rows of each)", group="data"
    )
    validation: str | None = _setting(None, "validation file (default: a part of the training data)", group="data")
    validation_fraction: float | None = _setting(None, "part of the data kept for validation (0.1)", group="data")
    task: str = _setting(
        "lm",
        "predict the next token, classify, or prefer: learn from answers of which it is known which are better",
        group="data",
        choices=("lm", "classify", "preference"),
    )
    format: str | None = _setting(
        None,
        "format of the data, where the file's name does not say",
        group="data",
        choices=("text", "jsonl", "csv", "tsv", "parquet", "arrow"),
    )
    text_column: str = _setting("text", "column (or JSON key) of the text", group="data")
    text_pair_column: str | None = _setting(None, "column of a second text, for pairs", group="data")
    label_column: str = _setting("label", "column of the label", group="data")
    chat_template: str = _setting(
        "auto",
        "how chat messages become text: model (the model's own), chatml, plain, or a .jinja file; auto takes the model's "
        "own, and says so where there is none",
        group="data",
    )
    max_rows: int | None = _setting(None, "train on this many rows, drawn by the seed", group="data")
    max_validation_rows: int | None = _setting(None, "validate on this many rows, drawn by the seed", group="data")
    max_length: int | None = _setting(
        None, "longest row in tokens (lm: 256, classify: 128, preference: 512)", group="data"
    )
    long_rows: str | None = _setting(
        None,
        "rows longer than that: lose their end, are left out, or become pieces (texts: split; prompts, chats, rows to "
        "classify: truncate)",
        group="data",
        choices=("truncate", "drop", "split"),
    )
    packing: bool | None = _setting(None, "pack several short rows into one (lm only; default on)", group="data")

    stream: bool | None = _setting(
        None,
        "keep encoded rows in a file on the disk of --out and read from it what each step wants, with the same result; off, "
        "rows are in memory (default: on where the files have 67 MB or more)",
        group="data",
        resumable=True,
    )

    method: str | None = _setting(None, told.method_help, group="method", choices=told.method_names)
    rank: int | None = _setting(None, told.rank_help, group="method")
    alpha: float | None = _setting(
        None,
        "the update is scaled by alpha over the rank at the start (twice the rank, for most methods)",
        group="method",
    )
    dropout: float | None = _setting(None, "dropout on the adapters' input (0)", group="method")
    init: str | None = _setting(None, told.init_help, group="method")
    targets: str | None = _setting(None, told.targets_help, group="method")
    links: int | None = _setting(None, told.links_help, group="method")
    set: dict[str, Any] = _setting(  # noqa: RUF009  (a field)
        {},
        "a hyperparameter of the method's own, such as target=4, over what the job chooses; may be given several times "
        "(TOML: a [set] table); `jlora inspect --method NAME` lists them",
        group="method",
    )
    lora_plus_ratio: float | None = _setting(None, "LoRA+: learning rate of b over that of a", group="method")
    adapter: str | None = _setting(
        None,
        "go on from these adapters, with their own methods, ranks and places: a run's folder, one that jlora.save wrote, or "
        "one in PEFT's format",
        group="method",
    )
    spec: dict[str, Any] = _setting({}, "TOML only: table of regex to method table", group="method")  # noqa: RUF009  (a field)

    preference_loss: str | None = _setting(
        None,
        "preference: dpo or ipo, of pairs of answers; kto, of answers that are good or bad each by itself (dpo)",
        group="training",
        choices=("dpo", "ipo", "kto"),
    )
    beta: float | None = _setting(
        None, "preference: how strongly the model is held near its base (0.1)", group="training"
    )
    label_smoothing: float | None = _setting(
        None, "dpo: share of the pairs whose answers may be the wrong way round (0)", group="training"
    )

    steps: int | None = _setting(None, "optimizer steps (this or --epochs)", group="training")
    epochs: float | None = _setting(None, "passes over the data (lm: 1, classify: 3, preference: 1)", group="training")
    batch: int | None = _setting(
        None, "rows per optimizer step, at most all (lm: 16, classify: 32, preference: 16)", group="training"
    )
    accumulate: int = _setting(1, "cut each batch into this many parts, computed one after another", group="training")
    learning_rate: float | None = _setting(None, told.rate_help, group="training")
    optimizer: str = _setting(
        "adamw",
        "what makes steps of gradients; lion's usual rates are 0.3 times those of the others",
        group="training",
        choices=("adamw", "lion", "adafactor", "muon"),
    )
    schedule: str = _setting(
        "cosine",
        "course of the learning rate after the warm-up",
        group="training",
        choices=("constant", "linear", "cosine"),
    )
    warmup: int | None = _setting(None, "steps of linear warm-up (3%% of all steps)", group="training")
    clip: float = _setting(1.0, "largest norm of the gradient; 0 turns clipping off", group="training")
    weight_decay: float = _setting(0.0, "decoupled weight decay", group="training")
    seed: int = _setting(0, "seed of adapters, data order and dropout", group="training")
    sweep: dict[str, Any] = _setting(  # noqa: RUF009  (a field)
        {},
        "train a run for each of several values at once, such as learning-rate=1e-4,3e-4; given several times, for each "
        f"combination (of {', '.join(each.replace('_', '-') for each in SWEPT)}; TOML: a [sweep] table of lists)",
        group="training",
    )
    seeds: int | None = _setting(
        None,
        "train that many runs at once, of seeds from --seed on (with --sweep: of each combination)",
        group="training",
    )
    offload: bool = _setting(
        False, "keep the optimizer's moments in the host's memory, not the device's", group="training", resumable=True
    )
    mesh: str | None = _setting(
        None, "devices as axes, such as data=2,model=2 (default: one device)", group="training", resumable=True
    )
    shard: dict[str, Any] = _setting(  # noqa: RUF009  (a field)
        {},
        "how the weights whose whole path the regex matches are cut over the mesh: for each axis of the weight an axis of "
        "--mesh, several joined by +, or None, such as None,fsdp,tensor; may be given several times, the first match counts "
        "(TOML: a [shard] table)",
        group="training",
        resumable=True,
    )

    out: str = _setting("jlora_run", "output folder", group="run", resumable=True)
    resume: bool = _setting(False, "go on from the last whole checkpoint in --out", group="run", resumable=True)
    evaluate_every: int | None = _setting(
        None, "steps between validations (a fifth of the run, 10 at least)", group="run", resumable=True
    )
    checkpoint_every: int | None = _setting(
        None, "steps between checkpoints (a tenth of the run, 10 at least)", group="run", resumable=True
    )
    keep: int = _setting(2, "checkpoints kept", group="run", resumable=True)
    metric: str = _setting(
        "loss",
        "what validations are judged by: loss, perplexity, accuracy, f1, matthews, or what comes of answers that the model "
        "writes to prompts of the validation rows, exact_match and rouge_l",
        group="run",
        choices=tuple(scored.METRICS),
    )
    metric_rows: int = _setting(
        32, "validation rows that are answered for exact_match and rouge_l, the first ones", group="run"
    )
    patience: int | None = _setting(
        None,
        "stop after so many validations in a row that were no better than the best (never)",
        group="run",
        resumable=True,
    )
    best: bool | None = _setting(
        None,
        "keep the checkpoint of the best validation and end with its adapters, not the last step's (default: on with "
        "--patience, or another --metric than the loss)",
        group="run",
        resumable=True,
    )
    prompt: str | None = _setting(None, "prompt of the samples before and after (lm only)", group="run", resumable=True)
    sample_tokens: int = _setting(64, "tokens of each sample; 0 for none", group="run", resumable=True)
    report_to: str | None = _setting(
        None,
        "report the metrics to tensorboard, wandb or mlflow as well, several with commas between; each is an extra of the "
        "same name: pip install 'jlora[wandb]'",
        group="run",
        resumable=True,
    )
    progress: str = _setting(
        "auto",
        "progress bar (lines where the output is a file), plain lines, or nothing",
        group="run",
        choices=("auto", "bar", "lines", "none"),
        resumable=True,
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        _check_ranges(self)
        _check_combinations(self)
        check_axes(mesh_axes(self.mesh), shard_rules(self.shard))


_TYPES = {
    "str": str, "str | None": str, "int": int, "int | None": int, "float": (int, float), "float | None": (int, float),
    "bool": bool, "bool | None": bool, "dict[str, Any]": dict,
}  # fmt: skip
_WORDS = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false", "dict": "a table"}


def _check_type(field: dataclasses.Field, value: Any) -> None:
    """The value has the field's type, and is one of its choices."""
    annotation = str(field.type)
    if value is None and annotation.endswith("None"):
        return
    right = isinstance(value, _TYPES[annotation]) and not (isinstance(value, bool) and "bool" not in annotation)
    if not right:
        wanted = _WORDS[re.split(r"\W", annotation)[0]]
        raise SettingError(field.name, f"must be {wanted}, got {value!r} ({type(value).__name__})")
    choices = metadata_of(field, "choices")
    if choices and value not in choices:
        near = nearest(str(value), choices)
        hint = f"; did you mean {near}?" if near else ""
        raise SettingError(field.name, f"must be one of {', '.join(choices)}, got {value!r}{hint}")


_AT_LEAST_ONE = (
    "max_rows", "max_validation_rows", "rank", "links", "steps", "batch", "accumulate", "evaluate_every", "checkpoint_every",
    "keep", "seeds", "metric_rows", "patience",
)  # fmt: skip
_POSITIVE = ("alpha", "epochs", "learning_rate", "lora_plus_ratio", "beta")
_NOT_NEGATIVE = ("warmup", "clip", "weight_decay", "sample_tokens", "seed")


def _check_ranges(settings: Settings) -> None:
    """Numbers lie where they mean something."""
    rules = (
        (_AT_LEAST_ONE, lambda v: v >= 1, "at least 1"),
        (_POSITIVE, lambda v: 0 < v < float("inf"), "above 0"),
        (_NOT_NEGATIVE, lambda v: 0 <= v < float("inf"), "0 or more"),
        (("dropout",), lambda v: 0 <= v < 1, "at least 0 and below 1"),
        (("label_smoothing",), lambda v: 0 <= v < 0.5, "at least 0 and below 0.5"),
        (("validation_fraction",), lambda v: 0 < v < 1, "between 0 and 1"),
        (("max_length",), lambda v: v >= 2, "at least 2"),
    )
    for names, holds, wanted in rules:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise SettingError(name, f"must be {wanted}, got {value}")


def _check_combinations(settings: Settings) -> None:
    """Settings that exclude each other are not given together."""
    _check_method(settings)
    check_sweep(settings)
    if settings.steps is not None and settings.epochs is not None:
        raise SettingError("epochs", "and steps both say how long to train: give one of them")
    if settings.validation is not None and settings.validation_fraction is not None:
        raise SettingError("validation_fraction", "cuts a part off the training data, but a validation file is given")
    if settings.task != "lm" and settings.data is None:
        wanted = {"classify": "a label column", "preference": "answers that are better and worse"}[settings.task]
        raise SettingError("task", f"{settings.task} needs a data file with {wanted}")
    if settings.data is None and settings.weights is not None:
        raise SettingError("weights", "needs several data files to train on, with commas between")
    if settings.data is None and settings.validation is not None:
        raise SettingError("validation", "needs a data file to train on beside it")
    if settings.task != "lm" and settings.packing:
        raise SettingError("packing", f"is for --task lm; rows of --task {settings.task} are never packed")
    if settings.task != "lm" and settings.long_rows == "split":
        raise SettingError(
            "long_rows", f"split is for --task lm; a row of --task {settings.task} stays whole: truncate or drop it"
        )
    if settings.task != "classify" and settings.text_pair_column is not None:
        raise SettingError("text_pair_column", "is for --task classify")
    _check_preference(settings)
    for name in trackers_of(settings):
        if name not in TRACKERS:
            near = nearest(name, TRACKERS)
            hint = f"; did you mean {near}?" if near else ""
            raise SettingError("report_to", f"must be some of {', '.join(TRACKERS)}, got {name!r}{hint}")
    if settings.metric not in (known := scored.of_task(settings.task)):
        raise SettingError(
            "metric", f"{settings.metric} is not one of task {settings.task}, which has {', '.join(known)}"
        )
    if settings.chat_template not in CHAT_TEMPLATES and not settings.chat_template.endswith(".jinja"):
        raise SettingError(
            "chat_template", f"must be {', '.join(CHAT_TEMPLATES)} or a .jinja file, got {settings.chat_template!r}"
        )
    if settings.batch is not None and settings.batch % settings.accumulate:
        raise SettingError(
            "accumulate", f"must divide batch, but {settings.batch} / {settings.accumulate} is not whole"
        )
    if settings.links is not None and settings.steps is not None and settings.links > settings.steps:
        raise SettingError("links", f"must be at most the {settings.steps} steps, got {settings.links}")
    if settings.steps is not None and settings.warmup is not None and settings.warmup >= settings.steps:
        raise SettingError("warmup", f"must be less than the {settings.steps} steps, got {settings.warmup}")


def _check_preference(settings: Settings) -> None:
    """What is about preferences is given with them alone."""
    for name in ("preference_loss", "beta", "label_smoothing"):
        if getattr(settings, name) is not None and settings.task != "preference":
            raise SettingError(name, "is for --task preference")
    if settings.label_smoothing and settings.preference_loss not in (None, "dpo"):
        raise SettingError("label_smoothing", f"is for --preference-loss dpo, not {settings.preference_loss}")


def trackers_of(settings: Settings) -> list[str]:
    """The names that `--report-to` has, each once."""
    return list(dict.fromkeys(name.strip() for name in (settings.report_to or "").split(",") if name.strip()))


def _check_method(settings: Settings) -> None:
    """The method's options belong to the method."""
    method = settings.method or told.DEFAULT
    if settings.adapter is not None:
        _check_adapter(settings)
    elif settings.spec:
        for name in (*_OF_METHOD, "links"):
            if getattr(settings, name) not in (None, {}):
                raise SettingError(name, "and a [spec] table both say what is adapted: give one of them")
        if not trains_adapters(settings):
            raise SettingError("spec", f"and method {method} both say what is trained: give one of them")
    elif method == PROBE:
        _check_probe(settings)
    else:
        _check_recipe(settings, method, catalog.recipes()[method])
    if method == PROBE and settings.task != "classify":
        raise SettingError("method", f"{PROBE} trains the classification head: it needs task classify")
    if settings.targets is not None and settings.targets not in WORDS_FOR_TARGETS:
        try:
            re.compile(settings.targets)
        except re.error as error:
            raise SettingError("targets", f"is not a regular expression: {settings.targets!r} ({error})") from error


#: What `targets` may be beside a regular expression.
WORDS_FOR_TARGETS = ("all-linear", "embedding")
_OF_METHOD = ("rank", "alpha", "dropout", "init", "targets", "set")


def trains_adapters(settings: Settings) -> bool:
    """Whether `--method` is none of those that train weights as they are, all or the head alone."""
    method = settings.method or told.DEFAULT
    return method != PROBE and catalog.recipes()[method].targets != "all"


def has_method(settings: Settings) -> bool:
    """Whether `--method` and its options say what is adapted, and no `[spec]` table or `--adapter`."""
    return settings.adapter is None and not settings.spec


def _check_adapter(settings: Settings) -> None:
    """Nothing else says what is adapted, and how."""
    for name in ("method", *_OF_METHOD, "links", "spec"):
        if (value := getattr(settings, name)) not in (None, {}):
            raise SettingError(
                name,
                f"can't be given with adapter {settings.adapter}, whose adapters keep their own methods, ranks and places; "
                f"got {value!r}",
            )


def _check_probe(settings: Settings) -> None:
    for name in (*_OF_METHOD, "links", "lora_plus_ratio"):
        if getattr(settings, name) not in (None, {}):
            raise SettingError(name, f"has no meaning with method {PROBE}, which has no adapters")


def _check_recipe(settings: Settings, method: str, recipe: Recipe) -> None:
    """The method takes what is given, and is given what it asks for."""
    for name in ("rank", "alpha", "dropout", "links"):
        if getattr(settings, name) is not None and not recipe.has(name):
            own = told.names(lambda other, name=name: other.has(name))
            hint = f"; it is for {', '.join(own)}" if len(own) < 6 else ""
            raise SettingError(name, f"has no meaning with method {method}, which has none{hint}")
    for name in ("targets", "lora_plus_ratio") if recipe.targets == "all" else ():
        if getattr(settings, name) is not None:
            raise SettingError(name, f"has no meaning with method {method}, which has no adapters")
    rank = settings.rank or recipe.rank or 8
    check_names(recipe.make(rank, None), settings.set, settings.init, rank)
    for name in recipe.asks:
        if name not in settings.set:
            raise SettingError("method", f"{method} has no {name} by default: give them by --set {name}=...")
