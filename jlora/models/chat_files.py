"""The chat templates and special tokens of a Hugging Face directory, found where transformers finds them."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.disk.json_files import read_object as read_json
from jlora.models import files
from jlora.models.gguf.header import is_gguf

FILE, FOLDER, CONFIG = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"
DEFAULT = "default"
# The special tokens that every tokenizer of transformers knows.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class ChatSource:
    """A chat template as it is written down.

    Attributes:
        text: the Jinja text.
        place: the file that it stands in, and its name where the file holds several.
    """

    text: str
    place: str


def read_chat_templates(directory: str | os.PathLike) -> dict[str, ChatSource]:
    """The chat templates of a directory by name; the only or main one is called `default`.

    `chat_template.jinja` and `additional_chat_templates/*.jinja` come before the `chat_template` of
    `tokenizer_config.json`, which is not looked at where there is one of them.

    Raises:
        ValueError: `tokenizer_config.json` is damaged, or its `chat_template` is neither a text nor a list of
            `{name, template}`; or a template is not UTF-8.
    """
    if is_gguf(directory):
        return _of_file(directory)
    root = Path(directory)
    found = {DEFAULT: root / FILE} if (root / FILE).is_file() else {}
    if (root / FOLDER).is_dir():
        found |= {path.stem: path for path in sorted((root / FOLDER).glob("*.jinja"))}
    if found:
        return {name: read_chat_template(path) for name, path in found.items()}
    return _configured(root / CONFIG)


def _of_file(path: str | os.PathLike) -> dict[str, ChatSource]:
    """The chat templates in the metadata of a GGUF file."""
    named = {
        DEFAULT if name == FILE else Path(name).stem: name for name in files.names(path) if name.endswith(".jinja")
    }
    return {name: ChatSource(files.read_text(path, file), files.place(path, file)) for name, file in named.items()}


def read_chat_template(path: str | os.PathLike) -> ChatSource:
    """The template in a file.

    Raises:
        ValueError: it is not UTF-8.
        OSError: it can't be read.
    """
    try:
        return ChatSource(Path(path).read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a chat template must be UTF-8 ({error}).") from error


def _configured(path: Path) -> dict[str, ChatSource]:
    found = read_json(str(path)).get("chat_template") if path.is_file() else None
    if not found:
        return {}
    if isinstance(found, str):
        return {DEFAULT: ChatSource(found, str(path))}
    named = found if isinstance(found, Mapping) else _listed(found)
    if not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise ValueError(f"{path}: chat_template must be a text or a list of {{name, template}}, got {found!r:.80}.")
    return {name: ChatSource(text, f"{path}, {name!r}") for name, text in named.items()}


def _listed(found: Any) -> dict[Any, Any]:
    """A list of `{name, template}` as a dict; anything else as `{None: None}`, which the caller refuses."""
    whole = isinstance(found, list) and all(isinstance(entry, Mapping) for entry in found)
    return {entry.get("name"): entry.get("template") for entry in found} if whole else {None: None}


def write_chat_templates(directory: str | os.PathLike, templates: Mapping[str, str]) -> None:
    """Writes templates by name as transformers does, in place of all that the directory holds.

    Raises:
        ValueError: a name can't be a file's name.
    """
    root = Path(directory)
    for path in (root / FILE, *(root / FOLDER).glob("*.jinja")):
        path.unlink(missing_ok=True)
    for name, text in templates.items():
        path = root / FILE if name == DEFAULT else root / FOLDER / f"{name}.jinja"
        if name != os.path.basename(name) or not name:
            raise ValueError(f"{directory}: a chat template is called {name!r}, which can't be a file's name.")
        path.parent.mkdir(exist_ok=True)
        # As bytes, so that no system changes the line ends: the model was trained on them as they are.
        path.write_bytes(text.encode("utf-8"))
    _tell_older_readers(root / CONFIG, templates)


def _tell_older_readers(path: Path, templates: Mapping[str, str]) -> None:
    """Updates the templates in `tokenizer_config.json`, if it holds any: older readers look for them nowhere else."""
    held = {name: source.text for name, source in _configured(path).items()}
    if held and held != templates:
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        content = read_json(str(path)) | {
            "chat_template": templates[DEFAULT] if set(templates) == {DEFAULT} else listed
        }
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_tokens(directory: str | os.PathLike) -> dict[str, str]:
    """The special tokens that templates see as `bos_token`, `eos_token` and so on; what is not set is left out.

    They are those of the usual names and a model's own, such as `image_token`. `special_tokens_map.json` is read only beside a
    `tokenizer_config.json` of the older releases of transformers, which read it too.

    Raises:
        ValueError: a file is damaged.
    """
    config = files.read_json(directory, CONFIG) if files.has_file(directory, CONFIG) else {}
    older = "special_tokens_map.json"
    if "added_tokens_decoder" not in config and files.has_file(directory, older):
        config = config | files.read_json(directory, older)
    extra = config.get("extra_special_tokens")
    own = {name: text for name, text in config.items() if name.endswith("_token")} | (
        dict(extra) if isinstance(extra, Mapping) else {}
    )
    usual = {name: _content(config.get(name)) for name in _NAMES}
    return {name: text for name, text in {**own, **usual}.items() if isinstance(text, str)}


def _content(token: Any) -> Any:
    """The text of a special token, which a file holds as a text or as a table."""
    return token.get("content") if isinstance(token, Mapping) else token
