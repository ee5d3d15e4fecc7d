"""A chat by a template: what bounded_templates.py has run in a process of its own (kilotune/bounded.py).

It takes ``{"template", "messages", "tools", "prompt", "going_on", "special"}``, and gives ``{"text"}`` or
``{"refused"}``. It is transformers' own function, with its sandbox; tested with transformers 5.23.
"""

from __future__ import annotations

from typing import Any

SHOWN = 300  # characters of what a template says against messages


def render(asked: dict[str, Any]) -> dict[str, str]:
    """What bounded_templates.py asks for."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(
            conversations=[asked["messages"]],
            tools=asked.get("tools"),
            chat_template=asked["template"],
            add_generation_prompt=asked["prompt"],
            continue_final_message=asked["going_on"],
            **asked["special"],
        )
    except MemoryError:
        raise
    except Exception as error:  # templates raise what they like: jinja2's errors, Python's, and those of their own
        return {"refused": ((str(error).strip() or type(error).__name__).splitlines()[0])[:SHOWN]}
    return {"text": texts[0]}


TAGS = "{{ strftime_now('%Y') }}{% generation %}{{ messages | tojson }}{% endgeneration %}"
FIRST = {"messages": [{"role": "user"}], "prompt": False, "going_on": False, "special": {}}
if __name__ == "bounded_function":  # what is loaded late is loaded now: a child opens no files
    for _template in (TAGS, "{{ raise_exception('no') }}", "{% include 'none' %}"):
        render({**FIRST, "template": _template})
