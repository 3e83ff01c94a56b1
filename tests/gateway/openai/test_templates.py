"""What chat templates expect; tests/engine/test_rendering.py compares it with what vLLM reads from them."""

import pytest
from jinja2 import TemplateSyntaxError

from ares.gateway.openai.templates import knows_developer, takes_parts

TEXT = {
    "plain": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "no loop": "{{ messages[0]['content'] }}",
    "another list": "{% for m in messages %}{% for c in m.tool_calls %}{{ c }}{% endfor %}{% endfor %}",
    "a macro of something else": "{% macro f(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(m.name) }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}
PARTS = {
    "item": "{% for m in messages %}{% for c in m['content'] %}{{ c.text }}{% endfor %}{% endfor %}",
    "attribute": "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
    "filter": "{% for m in messages %}{% for c in m.content | selectattr('type') %}{{ c }}{% endfor %}{% endfor %}",
    "alias": "{% set rest = messages[1:] %}{% set all = rest %}"
    "{% for m in all %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
    "variable": "{% for m in messages %}{% set content = m.content %}"
    "{% for c in content %}{{ c }}{% endfor %}{% endfor %}",
    "macro": "{% macro f(x, parts) %}{% for c in parts %}{{ c }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(1, m.content) }}{% endfor %}",
    "keyword": "{% macro f(parts) %}{% for c in parts %}{{ c }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(parts=m.content) }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEXT.values(), ids=TEXT.keys())
def test_templates_that_take_text(template: str) -> None:
    assert not takes_parts(template)


@pytest.mark.parametrize("template", PARTS.values(), ids=PARTS.keys())
def test_templates_that_take_parts(template: str) -> None:
    assert takes_parts(template)


def test_what_is_no_template() -> None:
    with pytest.raises(TemplateSyntaxError):
        takes_parts("{% for %}")


def test_developer() -> None:
    assert knows_developer("{% if m.role == 'developer' %}")
    assert not knows_developer("{# for developers #}")
