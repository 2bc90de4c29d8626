"""Chat templates that data was made for, by the names under which they are known."""

from pathlib import Path

from hanok.text_files import read_text

VICUNA = """\
{%- set system = "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions." %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}{{ system }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- " USER: " if loop.first else "USER: " }}{{ message.content }}
    {%- elif message.role == "assistant" %}
        {{- " ASSISTANT:" }}{% generation %}{{ " " + message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception("vicuna_v1.1 knows no role " + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ " ASSISTANT:" }}{% endif %}"""

NAMED = {"vicuna_v1.1": VICUNA}


def resolve(given: str | None) -> str | None:
    """Return the text of a template that is named here or in a file; anything else as it is."""
    if given is None or "{" in given:
        return given
    if given in NAMED:
        return NAMED[given]
    return read_text(Path(given)) if Path(given).is_file() else given
