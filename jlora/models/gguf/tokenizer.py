"""The `tokenizer.json` and `tokenizer_config.json` that a GGUF file's metadata stand for.

A file holds the vocabulary, and names what it does not hold: how text is cut before merges (`tokenizer.ggml.pre`), and whether
the vocabulary is one of bytes (`gpt2`) or of SentencePiece (`llama`). Merges of SentencePiece follow from the scores. A name
that is not known is refused: another cut gives other tokens, in silence.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from jlora.disk.json_files import shown
from jlora.models.gguf.header import Header

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN2 = rf"(?i:{_WORDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
)
_UNKNOWN, _CONTROL, _OWN = 2, 3, 4


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How text is cut into words before the merges of bytes.

    Args:
        pattern: the words (None: those of GPT-2).
        digits: every digit is a word.
        whole: a word that is a token is not built by merges.
        composed: the text is put in Unicode's form NFC first.
        begins: a text begins with the begin token where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    composed: bool = False
    begins: bool = False


_CUTS = {
    "gpt-2": _Cut(),
    "smollm": _Cut(digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Cut(_LLAMA3, whole=True, begins=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Cut(_QWEN2, composed=True)),
    "tekken": _Cut(_TEKKEN, whole=True, begins=True),
}


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """The tokens with what the file says of each."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[list[str]]


def tokenizer_files(header: Header) -> dict[str, dict[str, Any]]:
    """The contents of `tokenizer.json` and `tokenizer_config.json`.

    Raises:
        ValueError: for a vocabulary that is not there or not whole, or a name that is not known.
    """
    values = header.values
    model, vocabulary = values.get("tokenizer.ggml.model"), _vocabulary(header)
    if model == "gpt2":
        cut = _cut(header)
        whole, begins = _of_bytes(vocabulary, cut), cut.begins
    elif model == "llama":
        whole, begins = _of_pieces(vocabulary, header), True
    else:
        raise ValueError(f"{header.path}: tokenizer.ggml.model {shown(model)} is not supported, wanted gpt2 or llama.")
    config = _config(header, vocabulary, begins)
    told = enumerate(zip(vocabulary.tokens, vocabulary.kinds))
    whole["added_tokens"] = [_added(*each) for each in told if _is_added(*each[1])]
    if config["add_bos_token"]:
        whole["post_processor"] = _beginning(config["bos_token"], vocabulary.tokens)
    whole = {"version": "1.0", "truncation": None, "padding": None, **whole}
    return {"tokenizer.json": whole, "tokenizer_config.json": config}


def _vocabulary(header: Header) -> _Vocabulary:
    found = {name: header.values.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "scores", "merges")}
    tokens = found["tokens"]
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml.tokens is {shown(tokens)}, wanted the vocabulary.")
    if len(set(tokens)) != len(tokens):
        twin = collections.Counter(tokens).most_common(1)[0][0]
        raise ValueError(f"{header.path}: tokenizer.ggml.tokens holds {twin!r} twice.")
    kinds, scores = found["token_type"] or [1] * len(tokens), found["scores"] or []
    merges = [merge.split(" ") for merge in found["merges"] or []]
    if len(kinds) != len(tokens) or (scores and len(scores) != len(tokens)):
        raise ValueError(
            f"{header.path}: tokenizer.ggml.token_type or scores are not one for each of {len(tokens)} tokens."
        )
    known = set(tokens)
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= known:
            raise ValueError(
                f"{header.path}: tokenizer.ggml.merges holds {merge}, which are no two tokens that make one."
            )
    return _Vocabulary(tokens, kinds, scores, merges)


def _cut(header: Header) -> _Cut:
    name = header.values.get("tokenizer.ggml.pre")
    if name not in _CUTS:
        raise ValueError(
            f"{header.path}: tokenizer.ggml.pre {shown(name)} is not supported; supported: {', '.join(_CUTS)}."
        )
    return _CUTS[name]


def _of_bytes(vocabulary: _Vocabulary, cut: _Cut) -> dict[str, Any]:
    """Byte-pair merges of bytes, written in the alphabet of GPT-2."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": cut.pattern is None}
    before = [{"type": "Digits", "individual_digits": True}] if cut.digits else []
    if cut.pattern is not None:
        before.append({"type": "Split", "pattern": {"Regex": cut.pattern}, "behavior": "Isolated", "invert": False})
    return {
        "normalizer": {"type": "NFC"} if cut.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*before, level]},
        "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": _merging(vocabulary, ignore_merges=cut.whole),
    }


def _of_pieces(vocabulary: _Vocabulary, header: Header) -> dict[str, Any]:
    """SentencePiece: spaces are a letter, and what is no token is written in bytes."""
    if str(header.values.get("general.architecture")).startswith("gemma"):
        # Its scores don't follow the order of its merges, which is that of the tokens; and it has spaces as they are.
        spelled = ["▁" * len(token) if not token.strip(" ") else token for token in vocabulary.tokens]
        vocabulary = dataclasses.replace(
            vocabulary, tokens=spelled, scores=[-float(number) for number in range(len(spelled))]
        )
    if not vocabulary.merges:
        vocabulary = dataclasses.replace(vocabulary, merges=_merges(vocabulary, header))
    prefixed = header.values.get("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = [{"type": "Prepend", "prepend": "▁"}] if prefixed else []
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    unknown = next((t for t, kind in zip(vocabulary.tokens, vocabulary.kinds) if kind == _UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*back, *strip]},
        "model": _merging(vocabulary, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _merging(vocabulary: _Vocabulary, **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
        "merges": vocabulary.merges,
    }


def _merges(vocabulary: _Vocabulary, header: Header) -> list[list[str]]:
    """Every pair of tokens that make a token, the best first: SentencePiece joins the pair whose token scores highest."""
    if not vocabulary.scores:
        raise ValueError(
            f"{header.path}: tokenizer.ggml.scores is missing, from which the merges of the vocabulary follow."
        )
    known, found = set(vocabulary.tokens), []
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds):
        if kind in (_UNKNOWN, _CONTROL):
            continue
        for at in range(1, len(token)):
            if token[:at] in known and token[at:] in known:
                found.append((-score, -at, [token[:at], token[at:]]))
    return [pair for *_, pair in sorted(found)]


def _is_added(token: str, kind: int) -> bool:
    """Whether it is found in the text as it stands; runs of spaces are made by merges."""
    return kind in (_CONTROL, _OWN, _UNKNOWN) and bool(token.strip(" "))


def _added(number: int, token: tuple[str, int]) -> dict[str, Any]:
    """A token that is found in the text as it stands."""
    told = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token[0], **told, "special": token[1] != _OWN}


def _config(header: Header, vocabulary: _Vocabulary, begins: bool) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}
    for name, key in names.items():
        number = header.values.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(vocabulary.tokens):
            raise ValueError(
                f"{header.path}: tokenizer.ggml.{key}_token_id is {shown(number)}, wanted a token's number."
            )
        told[name] = vocabulary.tokens[number]
    wanted = header.values.get("tokenizer.ggml.add_bos_token", begins)
    return told | {"add_bos_token": bool(wanted) and "bos_token" in told}


def _beginning(token: str, tokens: list[str]) -> dict[str, Any]:
    """Puts the begin token before a text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    known = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": known,
    }
