"""Chat templates in the form of well-known ones: what they write, not their text.

Each stands for a way of writing conversations; what it adds, drops or refuses is what the models'
own templates add, drop or refuse.
"""

from dataclasses import dataclass

# A date, trimmed contents, one call a message, tools' answers as JSON by a role of their own.
_LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}
{%- if tools %}{{ 'Functions:\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('one tool call only') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name }}
        {{- '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- message.content | tojson }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim }}{{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

# A system prompt where none is given.
_SMOLLM_2 = """\
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

# The same with tools, whose answers are the user's.
_QWEN = """\
{%- if tools or messages[0].role == 'system' or default_system %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}{{ default_system }}
{%- endif %}
{%- if tools %}{{ '\n\n# Tools\n<tools>' }}
{%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(query=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
    {{- '<|im_start|>assistant\n' }}
    {%- THOUGHTS %}
    {%- for call in message.tool_calls or [] %}
        {%- if said or not loop.first %}{{ '\n' }}{% endif %}
        {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
    {%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}PROMPT{% endif %}
"""
_QWEN_25 = (
    _QWEN.replace(
        "{%- THOUGHTS %}", "{%- set said = message.content %}{{- message.content or '' }}"
    )
    .replace("PROMPT", "")
    .replace("default_system", "'You are Qwen.'")
)

# Earlier answers lose their thoughts; the last has some, if none is given.
_QWEN_3 = (
    _QWEN.replace(
        "{%- THOUGHTS %}",
        """\
    {%- set thoughts, said = '', message.content or '' %}
    {%- if message.reasoning_content is string %}{% set thoughts = message.reasoning_content %}
    {%- elif '</think>' in said %}
        {%- set thoughts = said.split('</think>')[0].rstrip('\n') %}
        {%- set thoughts = thoughts.split('<think>')[-1].lstrip('\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.query and (loop.last or thoughts) %}
        {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
    {%- else %}{{ said }}{% endif %}
""",
    )
    .replace(
        "PROMPT",
        "{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    )
    .replace("default_system", "''")
)

# Turn by turn or not at all; system and tools come with the last question.
_MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- endif %}
{%- set ns = namespace(turn=0, last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {%- if (message.role == 'user') != (ns.turn % 2 == 0) %}
            {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
        {%- endif %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- endif %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == ns.last %}
            {{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' }}
        {%- if system is defined and loop.index0 == ns.last %}{{ system + '\n\n' }}{% endif %}
        {{- message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('tool call IDs must have nine characters') }}
            {%- endif %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + '}[/TOOL_RESULTS]' }}
    {%- else %}{{ raise_exception('only user, assistant and tool roles') }}
    {%- endif %}
{%- endfor %}
"""

_PHI_4 = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}
"""

# Ends with a token that is not there once more messages follow.
_PHI_4_MINI = """\
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}
"""

# No system's role, another name for the assistant's, strictly in turn, trimmed.
_GEMMA_3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set first = '' %}{% endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) }}
    {{- '\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""

# Drops the thoughts of every answer, and has the next one begin with some.
_R1 = """\
{{- bos_token }}
{%- for message in messages if message.role == 'system' %}{{ message.content }}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ '<\uff5cUser\uff5c>' + message.content }}
    {%- elif message.role == 'assistant' and message.content is none %}
        {{- '<\uff5cAssistant\uff5c><\uff5ctool\u2581calls\u2581begin\uff5c>' }}
        {%- for call in message.tool_calls %}
            {{- call.function.name + '\n' }}{{- call.function.arguments | tojson }}
        {%- endfor %}
        {{- '<\uff5ctool\u2581calls\u2581end\uff5c>' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- '<\uff5cAssistant\uff5c>' + message.content.split('</think>')[-1] + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '<\uff5ctool\u2581output\u2581begin\uff5c>' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\n' }}{% endif %}
"""


@dataclass(frozen=True)
class Form:
    """A way of writing conversations.

    Attributes:
        template: in jinja.
        end: what ends an answer, and is learnt with it.
        strip: of an answer's text, what the template takes away: blanks of `both` ends, line ends
            at its beginning (`lines`), or nothing.
        thoughts: of an answer with <think>...</think>, whether all, none or those of its own text
            are written.
        tools: are written.
    """

    template: str
    end: str
    strip: str = ""
    thoughts: bool = True
    tools: bool = False


FORMS = {
    "Llama 3": Form(_LLAMA_3, "<|eot_id|>", strip="both", tools=True),
    "Qwen2.5": Form(_QWEN_25, "<|im_end|>\n", tools=True),
    "Qwen3": Form(_QWEN_3, "<|im_end|>\n", strip="lines", tools=True),
    "Mistral": Form(_MISTRAL, "</s>", strip="both", tools=True),
    "SmolLM2": Form(_SMOLLM_2, "<|im_end|>\n"),
    "Phi-4": Form(_PHI_4, "<|im_end|>"),
    "Phi-4-mini": Form(_PHI_4_MINI, "<|end|></s>"),
    "Gemma 3": Form(_GEMMA_3, "<end_of_turn>\n", strip="both"),
    "R1": Form(_R1, "</s>", thoughts=False),
}
