"""The engine: every request gets what it gets alone, whatever runs beside it, comes and goes."""

import gc
import threading
import time
import weakref

import jax
import numpy as np
import pytest
from serving.served import ROWS, adapters, ask, check_greedy, engine, loaded, prompts, sites, store, trained

import jlora
from jlora.serving import Closed, Engine, Finished, QueueFull, UnknownAdapter
from jlora.serving.room import Held

NAMES = (None, *("one", "two", "dora", "few", "rs"))


@pytest.fixture(scope="module")
def served():
    made = engine()
    made.start()
    yield made
    made.close(drain=False, timeout=60)


def test_each_request_gets_what_it_gets_alone(served):
    """Prompts of up to four chunks, six adapters for three rows and two slots, some cancelled on the way."""
    rng, before = np.random.default_rng(1), served.state()
    asked = [
        (prompt, NAMES[int(rng.integers(len(NAMES)))], int(rng.integers(1, 20))) for prompt in prompts(40, longest=31)
    ]
    heard = [ask(served, prompt, name, count) for prompt, name, count in asked]
    for each in heard[::7]:
        each.request.cancel()
    for (prompt, name, count), each in zip(asked, heard):
        assert each.wait().end in (Finished("length"), Finished("cancelled"))
        check_greedy(prompt, name, each.ids)
        assert len(each.ids) == count or each.request.cancelled
    after = served.state()
    assert (after.programs, after.running, after.waiting) == (3, 0, 0)
    assert after.loads - before.loads > 5 and after.resident == 2
    assert after.finished["length"] >= 34 and after.tokens - before.tokens == sum(len(each.ids) for each in heard)


def test_adapters_differ(served):
    """The check before would see an adapter taken for another one."""
    texts = {tuple(ask(served, [1], name, 12).wait().ids) for name in NAMES}
    assert len(texts) == len(NAMES)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 30, "top_p": 0.8}], ids=str)
def test_what_is_drawn_depends_on_the_seed_alone(served, options):
    asked = dict(max_new_tokens=12, adapter="two", temperature=1.3, seed=5, **options)
    alone = ask(served, [1, 410], **asked).wait().ids
    beside = [ask(served, prompt, "one", 14, temperature=0.9 * (n % 2), top_k=9) for n, prompt in enumerate(prompts(5))]
    crowded = ask(served, [1, 410], **asked)
    assert crowded.wait().ids == alone and len(alone) == 12
    assert ask(served, [1, 410], **{**asked, "seed": 6}).wait().ids != alone
    for each in beside:
        each.wait()


@pytest.mark.long
def test_what_is_drawn_is_what_generate_draws(served):
    model, _ = loaded()
    for seed in (0, 2**32 - 1):
        drawing = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "max_new_tokens": 12}
        wanted = jlora.models.generate(
            jlora.lift(model.apply), adapters()["two"], [[1, 410]], key=jax.random.key(np.uint32(seed)), **drawing
        )
        assert ask(served, [1, 410], "two", seed=seed, **drawing).wait().ids == wanted[0]


def test_an_adapter_that_was_evicted_gives_equal_bits_again(served):
    exact = lambda: [
        (t.id, t.logprob, t.top) for t in ask(served, [1, 410, 403], "dora", 10, logprobs=20).wait().tokens
    ]
    first, loads = exact(), served.state().loads
    assert exact() == first and served.state().loads == loads
    for name in ("one", "two", "few", "rs"):
        for each in [ask(served, [1], name, 2) for _ in range(ROWS)]:
            each.wait()
    assert exact() == first and served.state().loads == loads + 5


def test_probabilities_are_the_models(served):
    model, params = loaded()
    (token,) = ask(served, [1, 410], None, 1, logprobs=3, temperature=2.0, seed=1).wait().tokens
    wanted = np.asarray(jax.nn.log_softmax(model.apply({"params": params}, np.array([[1, 410]]))[0, -1]))
    np.testing.assert_allclose(token.logprob, wanted[token.id], atol=1e-4)
    assert [top for top, _ in token.top] == np.argsort(-wanted)[:3].tolist()
    np.testing.assert_allclose([value for _, value in token.top], np.sort(wanted)[::-1][:3], atol=1e-4)
    assert ask(served, [1, 410], None, 1, logprobs=0).wait().tokens[0].top == ()
    assert ask(served, [1, 410], None, 1).wait().tokens[0].logprob is None


def test_a_request_ends_before_its_end_token(served):
    free = ask(served, [1, 410], "one", 12).wait().ids
    stopped = ask(served, [1, 410], "one", 12, ends=[999_999, free[5]]).wait()
    assert stopped.ids == free[: free.index(free[5])] and stopped.end == Finished("stop")
    at_once = ask(served, [1, 410], "one", 12, ends=[free[0]]).wait()
    assert at_once.ids == [] and at_once.end == Finished("stop")


@pytest.mark.parametrize("swaps", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_many_swaps_compile_nothing(served, swaps):
    before = served.state().swaps
    while served.state().swaps - before < swaps:
        for heard in [ask(served, [1, 3 + n], NAMES[1 + n % 5], 2) for n in range(100)]:
            heard.wait()
    programs = served._programs
    assert served.state().programs == 3
    assert [each._cache_size() for each in (programs.read, programs.decode, programs._write)] == [1, 1, 1]


def test_a_cancelled_request_leaves_its_row(served):
    running = [ask(served, [1], "one", 63) for _ in range(ROWS)]
    waiting = ask(served, [1], "two", 4)
    while not running[0].tokens:
        time.sleep(0.01)
    waiting.request.cancel()
    assert waiting.wait().end == Finished("cancelled") and waiting.tokens == []
    for each in running:
        each.request.cancel()
    prompt = [1, 7, 9]
    check_greedy(prompt, "few", ask(served, prompt, "few", 6).wait().ids)
    assert all(each.wait().end.reason in ("cancelled", "length") for each in running)
    running[0].request.cancel()  # which has ended


def test_a_listener_that_fails_ends_its_own_request_alone(served, caplog):
    def fails(told):
        raise RuntimeError("gone")

    other = ask(served, [1, 5], "one", 30)
    request = served.submit([1], adapter="two", max_new_tokens=60, listen=fails)
    assert other.wait().end == Finished("length")
    check_greedy([1, 5], "one", other.ids)
    assert ask(served, [1], None, 2).wait().end == Finished("length")
    assert request.finished == Finished("cancelled") and "listener" in caplog.text


def test_numbers_that_are_none_end_one_request_and_leave_nothing_in_its_row(served):
    at = [("layers", "self_attn", name, "kernel") for name in ("q_proj", "v_proj")]
    fields = [{"a": np.ones((5, 64, 1)), "b": np.full((5, 1, width), np.nan)} for width in (64, 32)]
    served.adapters._held["bad"] = Held("bad", dict(zip(at, fields)))
    for _ in range(2):
        bad = [ask(served, [1, *range(3, 40)], "bad", 9) for _ in range(ROWS - 1)]
        beside = ask(served, [1, 8], "one", 20)
        for each in bad:
            assert each.wait().end == Finished("error", "the model's logits are not finite") and each.ids == []
        check_greedy([1, 8], "one", beside.wait().ids)
        for heard in [ask(served, [1, 8, n], "two", 9) for n in range(3, 3 + ROWS)]:
            assert heard.wait().end == Finished("length")
    check_greedy([1, 8, 5], "two", heard.ids)
    served.adapters.remove("bad")


def test_a_request_ends_with_the_adapter_it_was_taken_with(served):
    served.adapters.add("brief", adapters()["one"])
    blocking = [ask(served, [1], None, 40) for _ in range(ROWS)]
    waiting = ask(served, [1, 9], "brief", 8)
    served.adapters.remove("brief")
    served.adapters.add("brief", adapters()["two"])
    new = ask(served, [1, 9], "brief", 8)
    check_greedy([1, 9], "one", waiting.wait().ids)
    check_greedy([1, 9], "two", new.wait().ids)
    for each in blocking:
        each.wait()
    served.adapters.remove("brief")
    with pytest.raises(UnknownAdapter, match="no adapter 'brief' in the store, which has 5"):
        ask(served, [1], "brief")


def test_nothing_of_a_request_is_kept(served):
    heard = ask(served, [1, 2], "one", 3).wait()
    kept = weakref.ref(heard.request)
    del heard
    ask(served, [1, 2], "two", 3).wait()
    ask(served, [1, 2], "one", 3).wait()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"prompt": []}, "prompt: wanted at least one token"),
        ({"prompt": [1, -2]}, "prompt: wanted token ids, whole numbers from 0 and below 2^31, got [1, -2]"),
        ({"prompt": [1, 2.5]}, "prompt: wanted token ids"),
        ({"prompt": [1, 512]}, "token 512 is none of the 512 that the model knows"),
        ({"max_new_tokens": 0}, "max_new_tokens: wanted 1 or more, got 0"),
        ({"max_new_tokens": 64}, "its 1 tokens and max_new_tokens=64 are more than the 64 of a row"),
        ({"temperature": -1}, "temperature: wanted 0 or more"),
        ({"temperature": float("nan")}, "temperature: wanted 0 or more"),
        ({"top_k": 0}, "top_k: wanted 1 or more"),
        ({"top_p": 1.5}, "top_p: wanted a number above 0"),
        ({"seed": -1}, "seed: wanted a whole number from 0"),
        ({"ends": range(17)}, "ends: wanted at most 16 tokens, got 17"),
        ({"logprobs": 21}, "logprobs: wanted a number from 0 to 20"),
        # Each of these was taken, and ended the engine or was rounded.
        ({"ends": [2**31]}, "ends: wanted token ids, whole numbers from 0 and below 2^31"),
        ({"logprobs": 2.5}, "logprobs: wanted a whole number, got 2.5"),
        ({"temperature": 10**400}, "temperature: wanted 0 or a number from 2^-100 and below 2^127"),
        ({"temperature": 1.2e-38}, "temperature: wanted 0 or a number from 2^-100"),
        ({"seed": 1.5}, "seed: wanted a whole number, got 1.5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: wanted a whole number, got 2.5"),
        ({"top_k": 2.5}, "top_k: wanted a whole number, got 2.5"),
    ],
)
def test_what_is_out_of_range_is_refused_at_once(served, wrong, said):
    with pytest.raises(ValueError) as refused:
        ask(served, **{"prompt": [1], **wrong})
    assert said in str(refused.value)


def test_engines_that_fail_end_all_requests_and_say_why(served, monkeypatch):
    """Last of those that share the engine: the fault is at a request that is neither in the queue nor in a row yet."""
    running = [ask(served, [1], "one", 40 + 2 * n) for n in range(ROWS)]
    while not all(each.tokens for each in running):
        time.sleep(0.01)

    def fails(*_):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(served._programs, "write", fails)
    waiting = [ask(served, [1], "two", 4) for _ in range(2)]
    assert running.pop(0).wait().end == Finished("length")
    for each in (*running, *waiting):
        assert each.wait().end == Finished("error", "RuntimeError: the device is lost")
    with pytest.raises(Closed, match="the engine has failed: RuntimeError: the device is lost"):
        ask(served, [1])
    state = served.state()
    assert (state.open, state.error, state.running) == (False, "RuntimeError: the device is lost", 0)


# Without a program.


def test_a_full_queue_and_an_engine_that_never_starts():
    model, params = loaded()
    idle = Engine(model, params, rows=1, length=8, queue=2)
    heard = [ask(idle, [1], max_new_tokens=2) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait, as many as may"):
        ask(idle, [1], max_new_tokens=2)
    with pytest.raises(UnknownAdapter, match="the engine has no store"):
        ask(idle, [1], "one", max_new_tokens=2)
    idle.close()
    assert all(each.wait(1).end == Finished("cancelled") for each in heard)
    with pytest.raises(Closed, match="takes no more requests"):
        ask(idle, [1], max_new_tokens=2)
    with pytest.raises(Closed):
        idle.start()


def test_settings_that_can_not_be():
    model, params = loaded()
    with pytest.raises(ValueError, match="rows must be a positive whole number, got 0"):
        Engine(model, params, rows=0)
    with pytest.raises(ValueError, match="length: wanted 2 to 512 tokens"):
        Engine(model, params, length=513)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(ValueError, match="different bases"):
        Engine(model, other, length=8, adapters=store())


@pytest.mark.parametrize("program", ["write", "read"])
def test_an_engine_that_can_not_start_ends_what_has_waited(program, monkeypatch):
    made = engine()
    heard = ask(made, [1], "one")

    def fails(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(made._programs, program, fails)
    with pytest.raises(RuntimeError, match="no room"):
        made.start()
    assert heard.wait(1).end == Finished("error", "RuntimeError: no room")
    with pytest.raises(Closed):
        ask(made, [1])


@pytest.mark.long
def test_closing_finishes_what_runs_and_waits():
    made = engine(rows=2)
    heard = [ask(made, [1, 3 + n], "one", 9) for n in range(5)]
    made.start()
    threading.Thread(target=made.close).start()
    for n, each in enumerate(heard):
        assert each.wait().end == Finished("length")
        check_greedy([1, 3 + n], "one", each.ids)
    with pytest.raises(Closed):
        ask(made, [1])


@pytest.mark.long
def test_a_base_in_four_bits_is_served():
    model, params = loaded()
    spec = {".*/down_proj/kernel": None, jlora.ALL_LINEAR: jlora.NF4(block=32)}
    base = jlora.quantize(params, spec, sites=sites())
    own = {"lora": trained(jlora.LoRA(4), 3, params=base), "dora": trained(jlora.DoRA(jlora.LoRA(2)), 3, params=base)}
    held = store(params=base)
    for name, adapted in own.items():
        held.add(name, adapted)
    made = Engine(model, base, rows=2, length=64, chunk=8, adapters=held)
    made.start()
    asked = [(prompt, [None, "lora", "dora"][n % 3]) for n, prompt in enumerate(prompts(9))]
    heard = [ask(made, prompt, name, 12) for prompt, name in asked]
    plain = {name: jlora.merge(adapted) for name, adapted in own.items()}
    plain[None] = jlora.dequantize(base)
    for (prompt, name), each in zip(asked, heard):
        check_greedy(prompt, name, each.wait().ids, plain[name])
    assert made.state().programs == 3
    made.close()
