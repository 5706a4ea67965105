"""The page: one file that loads nothing from elsewhere and asks what there is. `experiments/serving/page.py` drives it in a
browser, by hand."""

import re

import pytest

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def page(call):
    answer = call("/")
    assert answer.status == 200 and answer.headers.get_content_type() == "text/html"
    return answer


def test_the_page_loads_nothing_from_elsewhere_and_may_not(page):
    text = page.body.decode()
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    links = re.findall(r"""(?:src|href|url|import)\s*[=(]\s*["']?([^"'\s)>]+)""", text)
    assert [link for link in links if not link.startswith("data:")] == []
    assert re.findall(r"https?://[^\s'\"]+", text) == ["http://www.w3.org/2000/svg"]  # a name, which is not loaded


def test_the_page_asks_routes_that_there_are(page, call):
    paths = set(re.findall(r'"(v1/[\w/]+)"', page.body.decode()))
    assert paths == {"v1/models", "v1/completions", "v1/chat/completions"}
    for path in paths - {"v1/models"}:
        assert call(f"/{path}", {"model": "none"}).status == 404
        assert call(f"/{path}", {}).body["error"]["message"] == "model is missing"


def test_a_call_as_the_page_makes_it_is_answered(page, call):
    text = page.body.decode()
    fields = {"model": "tiny", "prompt": "Hi", "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True},
              "temperature": 0.5, "top_p": 0.9, "seed": 0, "stop": "x"}  # fmt: skip
    assert all(name in text for name in fields)
    assert call("/v1/completions", fields).status == 200


def test_every_part_that_the_script_asks_for_is_on_the_page(page):
    text = page.body.decode()
    assert set(re.findall(r'at\("([\w-]+)"\)', text)) <= set(re.findall(r'id="([\w-]+)"', text))
    assert 'lang="en"' in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
