"""Chat templates of anyone's making: bombs are stopped, faults are told, and data stay as they are."""

import time

import pytest

from distft.errors import ConfigError, DataError
from distft.tokenizer.chat_template import ChatTemplate

GROWTH = "{{% set n = namespace(x={}) %}}{{% for a in range(99) %}}{{% set n.x = n.x {} n.x %}}{{% endfor %}}"
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "doubling by ~": GROWTH.format("'aa'", "~"),
    "doubling by +": GROWTH.format("'aa'", "+"),
    "doubling a list": GROWTH.format("[1]", "+"),
    "a product": "{{ 'a' * 10000000000 }}",
    "a list's product": "{{ ([1] * 10000000000)|length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a long range": "{{ range(9999999999)|list|length }}",
    "printf": "{{ '%09999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "a format's argument": "{{ '{:{}}'.format(1, 9999999999) }}",
    "printf's argument": "{{ '%*d' % (9999999999, 1) }}",
    "a filter's format": "{{ '%9999999999s'|format('a') }}",
    "center": "{{ 'a'|center(9999999999) }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "indented JSON": "{{ [1]|tojson(indent=9999999999) }}",
    "a long text": "{% for a in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace as a filter": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "join": "{{ ('a' * 1000000).join('b' * 1000000) }}",
    "join as a filter": "{{ ([1] * 60000)|join('b' * 1000000) }}",
    "map": "{{ range(99999)|map('string')|map('center', 60000)|list }}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "long work": "{% set x = 'a' * 9999999 %}{% for i in range(9999) %}{% set y = x|upper %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_loops_or_grows_without_end_is_stopped(name: str) -> None:
    started = time.process_time()
    with pytest.raises(DataError, match=r"the chat template (refuses it: (it |its )|fails: RecursionError)"):
        ChatTemplate(BOMBS[name], {}).render([])
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ namespace(__class__=1) }}", "must not begin with an underscore"),
        ("{{ raise_exception('no such role') }}", "refuses it: no such role"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        (
            "{% set a %}{% generation %}b{% endgeneration %}{% endset %}c{{ a }}",
            "its place in the text is unknown",
        ),
    ],
)
def test_a_template_that_fails_says_why(source: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        ChatTemplate(source, {}).render([])


@pytest.mark.parametrize("source", ["{% for %}", "{% generation %}", "{{ x|nothing }}", "{{ " + "(" * 9999])
def test_no_template_is_refused_when_it_is_read(source: str) -> None:
    with pytest.raises(ConfigError, match="the chat template is not Jinja"):
        ChatTemplate(source, {})


def test_data_and_variables_reach_the_template_as_they_are() -> None:
    template = ChatTemplate(
        "{{ messages[0].content }}{{ x }}{{ big }}", {}, variables={"x": {"a": 1}, "big": 10**9}
    )
    assert template.render([{"role": "user", "content": "<b>&'\""}]) == "<b>&'\"{'a': 1}1000000000"


def test_texts_that_look_like_wide_formats_are_formatted() -> None:
    source = (
        "{{ '** {} ** 123456 {:>4}'.format(1, 2) }}{{ '** %s ** 123456 %4d' % (1, 2) }}{{ '*%s'|format(3) }}"
    )
    assert ChatTemplate(source, {}).render([]) == "** 1 ** 123456    2** 1 ** 123456    2*3"


def test_an_array_of_texts_is_not_written_as_python_would() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ]
    knows = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    assert ChatTemplate(knows, {}).render(messages) == "ab"
    with pytest.raises(DataError, match="knows no arrays of texts, and writes that of message 2 with its"):
        ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}).render(messages)
