"""A chat template with tools that leaves room in the 512 tokens of the tiny checkpoint."""

TEMPLATE = """\
{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
