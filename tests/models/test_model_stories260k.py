"""The model in the package is the pretrained stories260K: same tokens, logits, text and loss."""

import functools
import itertools
import json
import struct

import jax
import numpy as np
import pytest
from models_data import shared_data

import jlora.models as models

REFERENCE = json.loads(shared_data("stories260k/reference.json").read_text())
BOS = 1


@functools.cache
def loaded():
    model, params = models.load(models.STORIES260K)
    return model, jax.jit(model.apply), {"params": params}


@functools.cache
def tokenizer():
    return models.load_tokenizer(models.STORIES260K)


@functools.cache
def stories() -> list[str]:
    return json.loads(shared_data("tinystories_1000/tinystories_1000.json").read_text())


class GreedyTokenizer:
    """The algorithm of llama2.c: characters (or bytes), then always the first pair whose union scores highest."""

    def __init__(self):
        data, at, self.pieces, self.scores = shared_data("stories260k/tok512.bin").read_bytes(), 4, [], []
        while at < len(data):
            score, length = struct.unpack("<fi", data[at : at + 8])
            self.pieces.append(data[at + 8 : at + 8 + length])
            self.scores.append(score)
            at += 8 + length
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def encode(self, text: str) -> list[int]:
        tokens = []
        for character in " " + text if text else text:
            piece = character.encode()
            tokens += [self.ids[piece]] if piece in self.ids else [byte + 3 for byte in piece]
        while True:
            unions = [self.ids.get(self.pieces[a] + self.pieces[b]) for a, b in itertools.pairwise(tokens)]
            found = [(self.scores[union], -i) for i, union in enumerate(unions) if union is not None]
            if not found:
                return [BOS, *tokens]
            at = -max(found)[1]
            tokens[at : at + 2] = [unions[at]]


def mean_loss(texts: list[str]) -> tuple[float, int]:
    """Nats a token and the number of tokens predicted, each text cut to 512 tokens."""
    _, apply, variables = loaded()
    total, count = 0.0, 0
    for start in range(0, len(texts), 10):
        rows = [tokenizer().encode(text).ids[:512] for text in texts[start : start + 10]]
        tokens, mask = np.zeros((10, 512), np.int32), np.zeros((10, 512), bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, True
        log_probability = jax.nn.log_softmax(apply(variables, tokens)[:, :-1])
        chosen = np.take_along_axis(np.asarray(log_probability), tokens[:, 1:, None], axis=2)[..., 0]
        total, count = total - float((chosen * mask[:, 1:]).sum()), count + int(mask[:, 1:].sum())
    return total / count, count


def test_tokens_and_text_agree_with_the_reference():
    assert tokenizer().encode(REFERENCE["sample_text"]).ids == REFERENCE["sample_token_ids"]
    assert tokenizer().decode(REFERENCE["sample_token_ids"]) == REFERENCE["sample_text"]
    assert tokenizer().decode(REFERENCE["greedy_from_bos_token_ids"]) == REFERENCE["greedy_from_bos_text"]


def test_tokens_agree_with_the_greedy_algorithm_on_many_sentences():
    greedy = GreedyTokenizer()
    sentences = [sentence for story in stories()[::10] for sentence in story.split("\n\n")[:2]]
    assert len(sentences) > 150
    for sentence in sentences:
        assert tokenizer().encode(sentence).ids == greedy.encode(sentence), sentence


@pytest.mark.parametrize(
    "text", ["", " ", "a  b   c", "\n\n\tx", "naïve 日本 “ﬁ”🙂", "<0x0A> <s", "zzzzqqqq aaaaaaaa 1234567890"]
)
def test_tokens_agree_with_the_greedy_algorithm_on_odd_texts_and_decode_back(text):
    tokens = tokenizer().encode(text).ids
    assert tokens == GreedyTokenizer().encode(text)
    assert tokenizer().decode(tokens) == text


def test_logits_agree_with_the_reference():
    _, apply, variables = loaded()
    ids = REFERENCE["logits_input_token_ids"]
    # Of the shape of `mean_loss`, so that both share one compilation.
    tokens = np.zeros((10, 512), np.int32)
    tokens[0, : len(ids)] = ids
    np.testing.assert_allclose(apply(variables, tokens)[0, len(ids) - 1], REFERENCE["logits_last_position"], atol=1e-4)


def test_the_greedy_continuation_agrees_with_the_reference():
    model, _, variables = loaded()
    wanted = REFERENCE["greedy_from_bos_token_ids"]
    written = models.generate(model.apply, variables["params"], [[BOS]], max_new_tokens=len(wanted) - 1)
    assert [BOS, *written[0]] == wanted


def test_the_loss_on_ten_stories_is_that_of_a_trained_model():
    loss, count = mean_loss(stories()[:10])
    # The first ten of the hundred stories of the reference, whose mean is 1.66; a uniform guess is 6.24.
    assert count > 3000
    assert 1.2 < loss < 1.7


@pytest.mark.long
@pytest.mark.parametrize("case", list(REFERENCE["mean_nll_nats_per_token"]))
def test_the_loss_on_a_hundred_stories_agrees_with_the_reference(case):
    wanted = REFERENCE["mean_nll_nats_per_token"][case]
    texts = [story.replace("\n\n", "\n") if "replaced" in case else story for story in stories()[:100]]
    loss, count = mean_loss(texts)
    assert count == wanted["tokens"]
    assert loss == pytest.approx(wanted["nll"], abs=2e-5)


def test_the_package_ships_licence_and_provenance():
    assert "MIT" in (models.STORIES260K / "LICENSE").read_text()
    assert "tinyllamas" in (models.STORIES260K / "PROVENANCE.md").read_text()
