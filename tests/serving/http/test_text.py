"""Text of tokens that come one by one: nothing is lost, nothing taken back, and it ends where it must."""

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jlora.models import STORIES260K, load_tokenizer
from jlora.serving.http.answers import Chance, Piece
from jlora.serving.http.asked import Asked
from jlora.serving.http.shapes import Shape
from jlora.serving.http.shelf import Entry
from jlora.serving.pieces import Pieces
from jlora.serving.text import Text, _begun, whole_text

pytestmark = pytest.mark.once

LETTERS = "Once upon a time 中国人 é ü 🙂🙂 said \n\n the dog. "


def stories():
    """Bytes stand for characters that have no token: `<0xE4>`."""
    return load_tokenizer(STORIES260K)


def letters():
    """GPT-2's: every byte is a letter, and tokens end within characters."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


@pytest.fixture(params=[stories, letters], ids=["byte fallback", "byte level"])
def tokenizer(request):
    return request.param()


def decoded(tokenizer):
    return lambda ids: tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)


def pieces_of(decode, prompt, tokens, stop=()):
    text, found = Text(decode, prompt, stop), []
    for token in tokens:
        found.append(text.add(token))
        if text.stopped:
            return found, text
    return [*found, text.end()], text


def drawn(rng, tokenizer, most):
    text = "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, most)))
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_pieces_are_the_text_wherever_prompt_and_characters_are_cut(tokenizer):
    rng, decode = random.Random(0), decoded(tokenizer)
    for _ in range(150):
        ids = drawn(rng, tokenizer, 150)
        cut = rng.randint(0, len(ids))
        pieces, text = pieces_of(decode, ids[:cut], ids[cut:])
        whole, told = decode(ids), "".join(pieces)
        # A character whose first bytes are the prompt's is the answer's.
        assert whole.endswith(told) and whole[: len(whole) - len(told)] in {
            decode(ids[: cut - n]) for n in range(4) if n <= cut
        }
        assert text.whole == told and not any("�" in piece for piece in pieces)


def test_bytes_of_no_character_lose_nothing_around_them(tokenizer):
    decode = decoded(tokenizer)
    ids = tokenizer.encode("ab中", add_special_tokens=False).ids
    lead = tokenizer.encode("中", add_special_tokens=False).ids[-3]
    after = tokenizer.encode("x cd", add_special_tokens=False).ids
    pieces, _ = pieces_of(decode, ids[:1], [*ids[1:], lead, *after])
    assert "".join(pieces).replace(" ", "").replace("�", "") in ("ab中xcd", "b中xcd")
    assert "中" in pieces and "".join(pieces).count("�") == 1
    # And at the end: what can't become a character is told as one that is none.
    assert "".join(pieces_of(decode, ids, [*ids, lead])[0]).endswith("中�")


@pytest.mark.parametrize(
    "stop", [["time"], ["a ti"], ["人"], ["国人 é"], ["\n\n"], ["said", "id \n"], ["no such"], ["🙂🙂 s"]]
)
def test_a_stop_text_is_found_across_tokens_and_characters_and_no_part_of_it_is_told(tokenizer, stop):
    decode = decoded(tokenizer)
    prompt = tokenizer.encode("Well", add_special_tokens=False).ids
    ids = tokenizer.encode("Well " + LETTERS, add_special_tokens=False).ids[len(prompt) :]
    whole = decode([*prompt, *ids]).removeprefix(decode(prompt))
    places = [whole.find(each) for each in stop if each in whole]
    pieces, text = pieces_of(decode, prompt, ids, stop)
    assert "".join(pieces) == text.whole == (whole[: min(places)] if places else whole)
    assert text.stopped == bool(places) and whole_text(decode, prompt, ids, stop) == text.whole
    assert sum(map(bool, pieces)) > 1  # it is told as it comes


def test_any_tokens_at_all_are_told_as_one_text_and_the_window_stays_small(tokenizer):
    rng, decode = random.Random(1), decoded(tokenizer)
    size, longest = tokenizer.get_vocab_size(), 0

    def counted(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    for _ in range(20):
        ids = [rng.randrange(3, size) if rng.random() < 0.5 else rng.randrange(3, min(size, 200)) for _ in range(300)]
        pieces, text = pieces_of(counted, ids[:5], ids[5:], ["qq", "e the"])
        assert "".join(pieces) == text.whole and "qq" not in text.whole and "e the" not in text.whole
    ids = drawn(rng, tokenizer, 900) * 3
    longest = 0
    pieces_of(counted, ids[:5], ids[5:])
    assert longest < 80


def test_single_tokens_have_their_text_with_its_space_and_their_bytes(tokenizer):
    pieces = Pieces(tokenizer)
    ids = tokenizer.encode("a dog é中🙂", add_special_tokens=False).ids
    assert b"".join(pieces.of(id)[1] for id in ids).decode().strip() == "a dog é中🙂"
    parts = [pieces.of(id) for id in tokenizer.encode("中", add_special_tokens=False).ids[-3:]]
    assert [raw for _, raw in parts] == [b"\xe4", b"\xb8", b"\xad"] and {text for text, _ in parts} == {"�"}


def test_a_special_token_is_told_by_its_name():
    assert Pieces(stories()).of(1) == ("<s>", b"<s>")


@pytest.mark.parametrize("written, told", [("dot", -1.0), ("comma", -0.5), ("byte", -7.0)])
def test_of_two_tokens_with_one_name_the_likelier_is_told_or_the_one_that_was_written(written, told):
    pieces = Pieces(stories())
    ids = {name: stories().token_to_id(token) for name, token in {"comma": ",", "byte": "<0x2C>", "dot": "."}.items()}
    assert pieces.of(ids["comma"]) == pieces.of(ids["byte"])
    logprobs = {"comma": -0.5, "dot": -1.0, "byte": -7.0}
    top = tuple((ids[name], logprob) for name, logprob in logprobs.items())
    asked = Asked(Entry("m", None, None), False, ([1],), 1, (1,), 0.0, None, None, None, (), 3, False, False)
    shape = Shape(asked, SimpleNamespace(token=pieces.of))
    chance = Chance(ids[written], logprobs[written], top, 0)
    (choice,) = shape.whole([Piece(0, ",", (chance,), "length")], {})["choices"]
    names = {name: pieces.of(id)[0] for name, id in ids.items()}
    (likeliest,) = choice["logprobs"]["top_logprobs"]
    assert likeliest == {names["comma"]: -0.5, names["dot"]: -1.0} | {names[written]: told}


def test_what_may_begin_a_stop_text_is_found_without_trying_all_its_beginnings():
    rng, looked = random.Random(3), []

    class Watched(str):
        def startswith(self, *given):
            looked.append(given)
            return super().startswith(*given)

    for _ in range(2000):
        text, stop = ("".join(rng.choice("ab") for _ in range(rng.randint(0, 9))) for _ in range(2))
        if stop:
            wanted = max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
            assert _begun(text, stop) == wanted, (text, stop)
    assert _begun("a text of many letters" * 100, Watched("!" * 1000)) == 0 and not looked
