"""A chat template of a model that calls tools, which is short: the tiny model has 512 tokens of context."""

from __future__ import annotations

TEMPLATE = """\
{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
