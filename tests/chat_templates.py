"""Chat templates in the ways that Qwen2.5's, Qwen3's, Llama 3's and SmolLM2's are written, and others."""

_CONTENT = "message['content']"
_TURN = "'<|im_start|>' + message.role + '\n' + {} + '<|im_end|>\n'"
_REPLY = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

QWEN25 = (
    "{%- if tools %}{{ '# Tools' }}{{ tools | tojson }}"
    "{%- elif messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a small model.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first)"
    " or (message.role == 'assistant' and not message.tool_calls) %}"
    f"{{{{- {_TURN.format('message.content')} }}}}"
    "{%- elif message.role == 'tool' %}{{ message.content | upper }}"
    "{%- endif %}{%- endfor %}" + _REPLY
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(looking=true, last_query=messages|length - 1) %}"
    "{%- for message in messages[::-1] %}"
    "{%- if ns.looking and message.role == 'user' and message.content is string"
    " and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.looking = false %}{%- set ns.last_query = messages|length - 1 - loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    f"{{{{- {_TURN.format('content')} }}}}"
    "{%- elif message.role == 'assistant' %}{%- set reasoning = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}"
    "{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}" + _REPLY
)
LLAMA31 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|im_start|>system\n\nToday: ' + date_string + '\n\n' + system + '<|im_end|>' }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    f"{{{{ {_TURN.format(_CONTENT)} }}}}{{% endfor %}}" + _REPLY
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
    f"{{{{ {_TURN.format('message.content')} }}}}{{% endgeneration %}}{{% else %}}"
    f"{{{{ {_TURN.format('message.content')} }}}}{{% endif %}}{{% endfor %}}" + _REPLY
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "
)
THOUGHTFUL = (  # a reply begins otherwise than it stands in the history
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{{ message.content.strip() }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n<think>\n' }}"
)
R1 = (  # what a reply thought is left out, and nothing else of it
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set content = message.content %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}<A>{{ content }}<end>"
    "{% else %}<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}<A><think>\n"
)
COMMANDS = (  # asks before and after it leaves white space out
    "{% for m in messages %}{% set c = m.content | trim %}[{{ m.role }}]"
    "{% if m.role == 'user' and (c.startswith('/') or c.endswith('/no_think')) %}!{% endif %}{{ c }}\n"
    "{% endfor %}[assistant]"
)
MADE = (  # texts that are made of contents, and only written
    "{% macro turn(m) %}{% set text %}<{{ m.role }}>{{ m.content }}{% endset %}{{ text }}</s>{% endmacro %}"
    "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all ~ turn(m) + '\n' %}{% endfor %}"
    "{{ ns.all }}<assistant>"
)
TAKEN = {
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama-3.1": LLAMA31,
    "smollm2": SMOLLM2,
    "marked": MARKED,
    "no-system": NO_SYSTEM,
    "thoughtful": THOUGHTFUL,
    "r1": R1,
    "commands": COMMANDS,
    "made": MADE,
}

_EACH = "{{% for m in messages %}}[{{{{ m.role }}}}]{}{{% endfor %}}>"
LEFT_OUT = {
    "date": ("{{ strftime_now('%Y') }}" + QWEN25, "writes the date (strftime_now)"),
    "random": (_EACH.format("{{ ['a', 'b'] | random }}{{ m.content }}"), "a random choice"),
    "upper": (_EACH.format("{{ m.content | upper }}"), "each content once"),
    "twice": (_EACH.format("{{ m.content }}{{ m.content }}"), "each content once"),
    "none": (_EACH.format(""), "each content once"),
    "reversed": ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", "in order"),
    "length": (
        _EACH.format("{% if m.content | length > 9 %}!{% endif %}{{ m.content }}"),
        "(its length)",
    ),
    "equal": (
        _EACH.format("{% if m.content == 'a' %}!{% endif %}{{ m.content }}"),
        "(what it equals)",
    ),
    "empty": (_EACH.format("{% if m.content %}{{ m.content }}{% endif %}"), "(its length)"),
    "first": (_EACH.format("{{ m.content[:1] }}{{ m.content }}"), "(a part of it)"),
    "json": (_EACH.format("{{ m.content | tojson }}"), "each content once"),
    "escaped": (_EACH.format("{{ m.content | e }}"), "each content once"),
    "joined": (
        "{% for m in messages %}{{ (m.role ~ m.content) | trim }}{% endfor %}>",
        "made of what is said",
    ),
    "left": (_EACH.format("{{ m.content.lstrip() }}"), "(lstrip)"),
    "numbered": (_EACH.format("{{ loop.index }}{{ m.content }}"), "another text in each turn"),
    "counted": ("{{ messages | length }}" + _EACH.format("{{ m.content }}"), "in each turn"),
    **{
        f"{condition} of {made}": (
            "{% macro r(m) %}{{ m.content }}{% endmacro %}{% for m in messages %}"
            + before
            + "{% if "
            + condition.format(made)
            + " %}!{% endif %}"
            "<{{ m.role }}>{{ m.content }}</s>{% endfor %}<A>",
            "depends on",
        )
        for before, made in (
            ("{% set x %}Q{{ m.content }}{% endset %}", "x"),
            ("{% set x = 'Q' + m.content %}", "x"),
            ("{% set x = 'Q' ~ m.content %}", "x"),
            ("", "(m.content ~ '\n')"),
            ("", "(messages | map(attribute='content') | join(' '))"),
            ("", "(messages | string)"),
            ("", "(m | string)"),
            ("", "(m.content | tojson)"),
            ("", "([m.content] | string)"),
            ("", "(m.content | e)"),
            ("", "(m.content | safe)"),
            ("", "(m.content | urlize)"),
            ("", "''.join([m.content])"),
            ("", "'{}'.format(m.content)"),
            ("", "('%s' % m.content)"),
            ("", "('%r' | format(m.content))"),
            ("", "(r(m) + '')"),
        )
        for condition in ("'magic' in {}", "{}.endswith('magic')")
    },
    "looked up": (
        _EACH.format("{{ {'hi': 'X'}.get(m.content, '') }}{{ m.content }}"),
        "depends on",
    ),
    "subscript": (_EACH.format("{{ {'hi': 'X'}[m.content] }}{{ m.content }}"), "depends on"),
    "key": (
        _EACH.format("{% if {m.content: 1} | length %}{{ m.content }}{% endif %}"),
        "depends on",
    ),
    "number": (
        _EACH.format("{% if m.content | int(0) > 0 %}!{% endif %}{{ m.content }}"),
        "depends on",
    ),
    "inside a text": (
        _EACH.format("{% if m.content in 'magic words' %}!{% endif %}{{ m.content }}"),
        "",
    ),
    "replaced": (
        _EACH.format("{{ (m.content ~ '\n').replace('<image>', '') }}"),
        "made of what is said",
    ),
    "filtered": (
        "{% for m in messages %}[{{ m.role }}]{% filter replace('<image>', '') %}{{ m.content }}{% endfilter %}"
        "{% endfor %}>",
        "depends on",
    ),
    "cut": (
        "{% set ns = namespace(all='') %}{% for m in messages %}"
        "{% set ns.all = ns.all + '[' + m.role + ']' + m.content %}{% endfor %}{{ ns.all[:6000] }}>",
        "made of what is said",
    ),
    "cut by a format": (_EACH.format("{{ '%.9000s' | format(m.content) }}"), "depends on"),
    "changed": (
        _EACH.format("{% if loop.changed(m.content) %}!{% endif %}{{ m.content }}"),
        "depends on",
    ),
    "previous": (
        _EACH.format("{% if m.content == messages[0].content %}!{% endif %}{{ m.content }}"),
        "what it equals",
    ),
    "many messages": (
        _EACH.format("{% if messages | length > 20 %}!{% endif %}{{ m.content }}"),
        "on 21 messages",
    ),
    "the hundredth": (
        _EACH.format("{% if loop.index == 100 %}!{% endif %}{{ m.content }}"),
        "messages",
    ),
    "the last ones": (
        "{% set messages = messages[-21:] %}" + _EACH.format("{{ m.content }}"),
        "messages",
    ),
    "what a model may say": (
        _EACH.format(
            "{% if m.role == 'assistant' and 'moves' in m.content %}!{% endif %}{{ m.content }}"
        ),
        "depends on what the assistant says (what it contains)",
    ),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "too long",
    ),
    "two lines": ("{{ raise_exception('one\ntwo') }}", "the chat template fails: one"),
    "needs a system message": (
        "{{ messages[0].content if messages[0].role == 'system' else raise_exception('no') }}",
        "the chat template fails: no",
    ),
    "damaged": ("{% for m in messages %}", "the chat template fails"),
}
"""Name -> (a template that is left out, words of the reason)."""
