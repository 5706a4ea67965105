"""README and docs are true: Python blocks run, shown output is what is printed, commands parse, links lead."""

import contextlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jlora
from jlora import method_from_dict
from jlora.disk import catalog
from jlora.training.cli import build_parser
from jlora.training.settings import told
from jlora.training.settings.configuration import gather

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- setup\n(?P<setup>.*?)^-->$|^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)

sys.path.insert(0, str(ROOT / "docs"))
import generated  # noqa: E402
import methods_table  # noqa: E402


def blocks(page):
    """(kind, text, first line) of every block of a page; hidden setup blocks are Python."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        kind = found["kind"] or "setup"
        yield kind, found["setup"] or found["body"], text[: found.start()].count("\n") + 2


def name(page):
    return str(page.relative_to(ROOT))


def run_page(page):
    """Runs the Python blocks of a page in order; a text block after a block that prints must be what it printed."""
    space, printed, count = {"__name__": "docs"}, "", 0
    for kind, text, line in blocks(page):
        if kind in ("python", "setup"):
            code = compile("\n" * (line - 1) + text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, space)
            printed, count = out.getvalue(), count + 1
        elif kind == "text" and printed:
            assert text.strip() == printed.strip(), f"{name(page)}, line {line}, shows other text than is printed"
            printed = ""
    return count


def pages_with_python():
    """The README's code runs on the oldest JAX too."""
    found = [page for page in PAGES if any(kind == "python" for kind, *_ in blocks(page))]
    return [pytest.param(page, id=name(page), marks=() if page == README else pytest.mark.once) for page in found]


@pytest.mark.parametrize("page", pages_with_python())
def test_every_python_block_runs_in_the_order_of_the_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rank_promotion = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")  # what a reader's own session has
    try:
        assert run_page(page) > 0
    finally:
        jax.config.update("jax_numpy_rank_promotion", rank_promotion)


def test_a_page_whose_shown_output_is_wrong_is_refused(tmp_path, monkeypatch):
    page = ROOT / "docs" / "wrong.md"
    text = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    with pytest.raises(AssertionError, match="line 6, shows other text"):
        run_page(page)


def shell_lines(page):
    for kind, text, line in blocks(page):
        if kind == "bash":
            for offset, command in enumerate(re.sub(r"\\\n\s*", " ", text).splitlines()):
                if command.strip() and not command.startswith("#"):
                    yield command, f"{name(page)}, line {line + offset}"


def jlora_commands():
    for page in PAGES:
        for command, where in shell_lines(page):
            lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            if names := [n for n, word in enumerate(words) if Path(word).name == "jlora" and "=" not in word]:
                yield pytest.param(words[names[0] + 1 :], id=where)


@pytest.mark.parametrize("words", list(jlora_commands()))
def test_every_jlora_command_that_is_shown_parses(words):
    arguments = build_parser().parse_args(words)
    assert arguments.command == words[0]


@pytest.mark.parametrize("page", [page for page in PAGES if any(b[0] == "toml" for b in blocks(page))], ids=name)
def test_every_toml_block_holds_settings_of_the_job(page, tmp_path):
    for number, text in enumerate(text for kind, text, _ in blocks(page) if kind == "toml"):
        file = tmp_path / f"{number}.toml"
        file.write_text(text)
        settings = gather({}, file).settings()
        assert [method_from_dict(table) for table in settings.spec.values()]


def test_the_readme_shows_the_two_commands_as_one_line_each():
    commands = [command for command, _ in shell_lines(README) if "-m venv" in command]
    assert len(commands) == 2
    assert commands[0].startswith("python3 -m venv") and commands[0].endswith("jlora finetune")
    assert commands[1].startswith("python3 -m venv") and commands[1].endswith("python -m pytest")


@pytest.mark.once
@pytest.mark.parametrize("page", generated.PAGES, ids=name)
def test_what_a_page_shows_of_the_code_is_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    if page.name != "peft.md":  # tries to save every method: tested in tests/interchange
        assert generated.filled(text, generated.MARKS) == text, "run `python docs/generated.py`"


def test_the_pages_show_every_method_and_flag_where_they_are_read():
    readme, page = README.read_text(), (ROOT / "docs" / "methods.md").read_text()
    assert all(f"`{name}`" in readme and f"| `{name}` |" in page for name in catalog.methods())
    held = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "fidelity.md").read_text(), re.M)
    assert sorted(held) == sorted(catalog.methods())
    command_line = (ROOT / "docs" / "command-line.md").read_text()
    assert all(f"| `{name}` |" in command_line for name in told.names())
    assert "| `--rank RANK` |" in command_line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- flags: merge -->\nand no end", "<!-- flags: merge --> stands alone"),
        ("<!-- /flags -->", "<!-- /flags --> stands alone"),
        ("<!-- flgs: merge -->\n<!-- /flgs -->", "unknown mark 'flgs'"),
    ],
)
def test_a_mark_that_is_wrong_or_alone_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        generated.filled(text, generated.MARKS)


@pytest.mark.parametrize(
    ("reference", "paper"),
    [
        ("Doe et al. 2031, arXiv:3101.01234.", "[3101.01234](https://arxiv.org/abs/3101.01234)"),
        ("Doe et al. 2031, arXiv 3101.01234v2.", "[3101.01234](https://arxiv.org/abs/3101.01234)"),
        ("Doe et al. 2031, https://arxiv.org/abs/3101.01234.", "[3101.01234](https://arxiv.org/abs/3101.01234)"),
        ("Doe et al. 2031, Journal of Adapters 7.", "Doe et al. 2031, Journal of Adapters 7."),
    ],
)
def test_a_method_copied_from_the_skeleton_stands_in_the_table_with_its_paper(reference, paper, tmp_path):
    text = (ROOT / "jlora" / "methods" / "_skeleton.py").read_text().replace("Skeleton", "DoeLoRA")
    placeholder = "Author et al. 2000, arXiv:0000.00000."
    assert text.count(placeholder) == 1
    file = tmp_path / "doe.py"
    file.write_text(text.replace(placeholder, reference))
    spec = importlib.util.spec_from_file_location("doe", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["doe"] = module  # dataclasses look the module up
    try:
        spec.loader.exec_module(module)
        row = methods_table.row(module.DoeLoRA)
    finally:
        del sys.modules["doe"]
    assert row.startswith("| `DoeLoRA` | One line that says what it is")
    assert row.endswith(f"| {paper} |")


def test_what_is_no_paper_is_no_paper_in_the_table():
    assert methods_table.row(jlora.Full).endswith("| – |")


def test_every_method_is_listed_in_one_family_with_lora_first_of_all():
    families = methods_table.families()
    assert sorted(cls.__name__ for members in families.values() for cls in members) == sorted(catalog.methods())
    assert next(iter(families.values()))[0] is jlora.LoRA
    assert all(families.values())


@pytest.mark.parametrize("stated", [{}, {"family": "Loras"}], ids=["none", "unknown"])
def test_a_method_that_states_no_family_of_its_own_is_refused(stated):
    derived = type("Derived", (jlora.LoRA,), stated)
    with pytest.raises(ValueError, match=r"Derived must state its family .*'Rank allocation'"):
        catalog.family(derived)


def test_text_after_the_arguments_of_a_docstring_is_no_part_of_them():
    docstring = "One.\n\nArgs:\n    a: first,\n        or\n    b: two.\n\nMore.\n\nRaises:\n    E: no."
    text = methods_table.as_markdown(docstring)
    assert text == "One.\n\n**Args**\n\n- `a`: first,\n    or\n- `b`: two.\n\nMore.\n\n**Raises**\n\n- `E`: no."


def test_base_classes_are_in_no_list_of_methods():
    found = catalog.methods()
    assert {"Around", "Gated", "Watched", "Method", "Skeleton"} & set(found) == set()
    assert all(getattr(jlora, name) is cls and cls.CASES for name, cls in found.items())
    assert {"LoRA", "DoRA", "Full"} <= set(found)


def test_the_page_of_the_api_has_every_public_name():
    listed = set(re.findall(r"\w+", (ROOT / "docs" / "api.md").read_text(encoding="utf-8")))
    methods = {cls.__name__ for cls in methods_table.methods()}
    public = {n for n, value in vars(jlora).items() if not n.startswith("_") and not inspect.ismodule(value)}
    for bridge in (jlora.nnx, jlora.linen):
        own = {n for n, value in vars(bridge).items() if getattr(value, "__module__", "") == bridge.__name__}
        public |= {n for n in own if not n.startswith("_")}
    assert sorted(public - listed - methods) == []
    assert {"adapterize", "lift", "LoRA"} <= public


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    generated = {"index.md": README, "changelog.md": ROOT / "CHANGELOG.md"}
    generated["contributing.md"] = ROOT / "CONTRIBUTING.md"
    missing = [link for link in links if not generated.get(link, page.parent / link).exists()]
    assert missing == []
    assert text.strip()


def test_every_file_that_a_page_names_exists():
    code = [
        (name(page), path) for page in PAGES for path in re.findall(r"`([\w./]+)`", page.read_text(encoding="utf-8"))
    ]
    named = [(page, path) for page, path in code if path.endswith((".py", "/")) and path[0] not in "./"]
    missing = [each for each in named if not any((top / each[1]).exists() for top in (ROOT, ROOT / "jlora"))]
    assert missing == []
    assert len(named) > 20


def test_the_picture_of_the_house_shows_every_room():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    picture = text.partition("```text\n")[2].partition("```")[0]
    package = ROOT / "jlora"
    rooms = [path for path in (*package.iterdir(), *(package / "core").iterdir()) if (path / "__init__.py").exists()]
    files = [path.stem for path in package.glob("*.py") if path.name != "__init__.py"]
    missing = [name for name in (*(f"{room.name}/" for room in rooms), *files) if name not in picture]
    assert missing == []
    assert len(rooms) > 10


def test_nothing_that_is_shown_to_readers_names_a_place_on_one_machine():
    tracked = [*PAGES, ROOT / "CHANGELOG.md", ROOT / ".ci" / "run", ROOT / "mkdocs.yml", ROOT / "pyproject.toml"]
    found = [name(p) for p in tracked if re.search(r"(?<![\w.])/(work|opt|home|root)/", p.read_text(encoding="utf-8"))]
    assert found == []


def test_the_script_of_ci_is_valid_bash():
    checked = subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
