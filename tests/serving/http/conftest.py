"""One server of the shipped model with three adapters, on one engine, for all tests of what it says over HTTP."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import openai
import pytest
from over_http import ask, is_idle, running, until

import jlora
from jlora import models
from jlora.training.cli import build_parser
from jlora.training.commands.serving import service_of

#: How `talk` was trained to read chats; the base has no template.
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


@pytest.fixture(scope="session")
def trained():
    """Adapters of the shipped model: the model, its params, and a function of rank and seed."""
    model, params = models.load(models.STORIES260K)
    tokens = jnp.array([[1, 410, 403]])
    sites = jlora.sites(lambda p, t: model.apply({"params": p}, t), params, tokens)

    @functools.cache
    def make(rank, seed):
        key = jax.random.key(seed)
        adapted = jlora.adapterize(params, {jlora.ALL_LINEAR: jlora.LoRA(rank)}, key, sites)
        return adapted.replace(
            params=jax.tree.map(lambda x: x + jax.random.normal(key, x.shape) * 0.06, adapted.params)
        )

    return SimpleNamespace(model=model, params=params, make=make)


@pytest.fixture(scope="session")
def folders(trained, tmp_path_factory):
    """A folder of adapters: `sql`, `talk` with a chat template, and `peft` in PEFT's format; and one that is no adapter."""
    top = tmp_path_factory.mktemp("adapters")
    jlora.save(top / "sql", trained.make(4, 1))
    jlora.save(top / "talk", trained.make(4, 2))
    (top / "talk" / "chat_template.jinja").write_text(TEMPLATE)
    jlora.save_peft(top / "peft", trained.make(2, 3), models.peft_names(trained.model))
    (top / "notes").mkdir()
    return top


@pytest.fixture(scope="session")
def service(folders):
    words = [
        "serve",
        "--adapters",
        str(folders),
        "--rows",
        "2",
        "--queue",
        "6",
        "--length",
        "320",
        "--served-name",
        "tiny",
        "--trust-templates",
    ]
    notes = []
    found = service_of(build_parser().parse_args(words), notes.append)
    assert notes == [f"note  {folders / 'notes'} holds no adapters: left out"]
    found.engine.start()
    yield found
    found.engine.close(drain=False)


@pytest.fixture(scope="session")
def server(service):
    """The server's address."""
    with running(service) as address:
        yield address


@pytest.fixture
def idle(service):
    """Waits at the end until the engine is idle: a test must leave nothing that runs."""
    yield
    until(lambda: is_idle(service))


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"http://{server}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="session")
def call(server):
    """A function that asks the server without any client's help."""
    return functools.partial(ask, server)


@pytest.fixture(scope="session")
def wanted(trained, service):
    """What an adapter goes on with, by `jlora.models.generate`, which knows nothing of serving: a function."""
    adapters = {"tiny": None, "sql": (4, 1), "talk": (4, 2), "peft": (2, 3)}
    lifted = jlora.lift(trained.model.apply)

    @functools.cache
    def gone_on(name, prompt):
        spec = adapters[name]
        runnable = (trained.model.apply, trained.params) if spec is None else (lifted, trained.make(*spec))
        options = {"max_new_tokens": 24, "temperature": 0.0, "eos_id": service.voice.ends}
        return [int(each) for each in models.generate(*runnable, [list(prompt)], **options)[0]]

    # A text that draws nothing is the beginning of a longer one: so there are few programs.
    def go_on(name, prompt, tokens):
        assert tokens <= 24
        return gone_on(name, tuple(prompt))[:tokens]

    return go_on


@pytest.fixture(scope="session")
def words(service):
    """Text to ids, and the text that ids add to those before."""
    codec = service.voice._codec

    def added(prompt, ids):
        return codec.decode([*prompt, *ids]).removeprefix(codec.decode(prompt))

    return SimpleNamespace(ids=codec.prompt, added=added, tokenizer=codec.tokenizer)
