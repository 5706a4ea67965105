"""Finished runs side by side: what differs, which is best, and one page."""

import json

import pytest

from jlora.training.cli import main
from jlora.training.errors import CheckpointError
from jlora.training.reporting.compare import best_run, compared, comparison_page, read_runs


def run(folder, name, loss, f1=None, **settings):
    out = folder / name
    out.mkdir()
    after = {"loss": loss} | ({} if f1 is None else {"f1": f1})
    results = {"before": after, "after": after, "steps": 2, "step": 2, "trained_values": 1200, "seconds": 3.2}
    given = {"method": "lora", "rank": 8, "metric": "loss", "out": str(out), **settings}
    (out / "settings.json").write_text(json.dumps({"settings": given}))
    (out / "results.json").write_text(json.dumps(results | {"complaint": "worse" if loss > 3 else None}))
    records = [{"step": n, "kind": "train", "loss": loss + 1 / n} for n in (1, 2)]
    records += [{"step": n, "kind": "validation", **after} for n in (0, 2)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(out)


def test_the_table_has_the_settings_that_differ_and_what_came_of_them(tmp_path):
    found = read_runs([run(tmp_path, "a", 2.0, rank=4), run(tmp_path, "b", 1.5, set={"x": 1})])
    header, rows = compared(found)
    assert header == ["run", "rank", "set", "validation loss", "of step", "trained values", "seconds"]
    assert rows == [["a", "4", "", "2.0000", "2", "1,200", "3"], ["b", "8", "x=1", "1.5000", "2", "1,200", "3"]]
    assert best_run(found) == 1


def test_runs_are_judged_by_their_metric_where_all_have_the_same(tmp_path):
    one, other = (run(tmp_path, name, loss, f1, metric="f1") for name, loss, f1 in (("a", 1.0, 0.5), ("b", 2.0, 0.9)))
    assert best_run(read_runs([one, other])) == 1
    third = run(tmp_path, "c", 0.5)
    assert best_run(read_runs([one, other, third])) == 2


def test_runs_of_one_name_in_two_folders_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    assert [each.name for each in read_runs([run(tmp_path / "x", "run", 1.0), run(tmp_path / "y", "run", 2.0)])] == [
        "x/run",
        "y/run",
    ]


def test_the_page_needs_nothing_beside_it_and_is_not_written_over(tmp_path, capsys):
    runs = [run(tmp_path, "a", 2.0, rank=4), run(tmp_path, "<b>", 4.0)]
    page = comparison_page(runs)
    assert "data:image/png;base64," in page and "http" not in page and "&lt;b&gt;: worse" in page
    assert page.count('<tr class="best"><td>a</td>') == 1 and "<td>&lt;b&gt;</td>" in page
    to = tmp_path / "page.html"
    assert main(["compare", *runs, "--to", str(to)]) == 0
    assert to.read_text() == page
    assert "*  a    4" in capsys.readouterr().out
    assert main(["compare", *runs, "--to", str(to)]) == 2
    assert "exists already; choose a new file" in capsys.readouterr().err


def test_a_run_that_is_not_finished_or_damaged_is_named(tmp_path):
    out = run(tmp_path, "a", 1.0)
    (tmp_path / "a" / "results.json").unlink()
    with pytest.raises(CheckpointError, match=r"a is not finished \(no results.json\)"):
        read_runs([out])
    with pytest.raises(CheckpointError, match=r"b holds no run \(no settings.json\)"):
        read_runs([tmp_path / "b"])
    for content in ("[]", "{", '{"after": {}, "steps": 1}'):
        (tmp_path / "a" / "results.json").write_text(content)
        with pytest.raises(CheckpointError, match="a is damaged or from another version"):
            read_runs([out])
