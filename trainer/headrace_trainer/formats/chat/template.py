"""The chat template of a tokenizer artifact: a default one, the check of one that came with it, and turns -> text.

In: turns as ``formats.records`` gives them. Out: text, and the spans of it that the assistant says, from ``transformers``'
own Jinja. Next: ``tokens`` makes ids of it.
"""

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from headrace_trainer.errors import UserError
from headrace_trainer.formats.records import Reason, Unusable
from headrace_trainer.formats.records.shapes import Tools, Turn
from headrace_trainer.formats.tokenizer import CONFIG_FILE, load_tokenizer, read_json, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers 5 keeps a template beside ``tokenizer_config.json``."""

START, END = "<|im_start|>", "<|im_end|>"

DEFAULT_TEMPLATE = """\
{%- macro call_of(call) -%}
<tool_call>
{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}
</tool_call>
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
    {{- raise_exception("role '" + message['role'] + "': write system, user, assistant or tool") -}}
  {%- endif -%}
  {%- if message['role'] == 'system' and not loop.first -%}
    {{- raise_exception('a system turn must be the first') -}}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\\n\\n' -}}{%- endif -%}
  {{- 'You may call these functions. Answer <tool_call>{"name": ..., "arguments": {...}}</tool_call> to call one.\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' and tools -%}{%- continue -%}{%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- generation -%}
      {{- message['content'] or '' -}}
      {%- for call in message['tool_calls'] or [] -%}
        {%- if not loop.first or message['content'] -%}{{- '\\n' -}}{%- endif -%}
        {{- call_of(call) -}}
      {%- endfor -%}
      {{- '<|im_end|>' -}}
    {%- endgeneration -%}
    {{- '\\n' -}}
  {%- elif message['role'] == 'tool' -%}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML, with the tool calls of Hermes that vLLM's ``hermes`` parser reads. What the assistant says, the token that ends
its turn included, is inside a generation span."""

_SPAN = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DAY = date(2024, 7, 26)
"""Today, to templates that ask: the day that Llama's say where there is no clock. A token must not depend on when it is made."""

_ADD_SPANS = (
    "wrap what the assistant says, the token that ends its turn included, in "
    "{% generation %} and {% endgeneration %}, as "
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
)


def with_chat_template(folder: Path, output: Path, *, template: str | None = None) -> None:
    """Write a tokenizer artifact with a chat template. No token's id changes.

    Args:
        folder: a tokenizer artifact.
        output: an empty folder.
        template: the template's text. If None, the tokenizer keeps its own; one without is given ``DEFAULT_TEMPLATE``,
            with its two tokens at the end of the vocabulary.

    Raises:
        UserError: the vocabulary has holes where the tokens would go.
    """
    loaded = load_tokenizer(folder)
    config = read_json(folder / CONFIG_FILE)
    own = _own_template(folder, config)
    if template is None and own is None:
        before = loaded.tokenizer.get_vocab(with_added_tokens=True)
        loaded.tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (START, END)])
        _check_no_id_moved(before, loaded.tokenizer.get_vocab(with_added_tokens=True), folder)
    save_tokenizer(
        loaded.tokenizer,
        output,
        eod=loaded.eod,
        config=config | {"chat_template": template or own or DEFAULT_TEMPLATE},
    )


def _own_template(folder: Path, config: dict[str, Any]) -> Any:
    """The template as the artifact has it: a text, or several by name."""
    beside = folder / TEMPLATE_FILE
    return beside.read_text(encoding="utf-8") if beside.is_file() else config.get("chat_template")


def _check_no_id_moved(before: dict[str, int], after: dict[str, int], folder: Path) -> None:
    ids = set(before.values())
    taken = [t for t, i in after.items() if (i != before[t] if t in before else i in ids)]
    if taken:
        raise UserError(
            f"{folder}: the vocabulary has holes, and {', '.join(taken)} would get ids that others have; "
            f"add {START} and {END} to its tokenizer.json"
        )


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Begin and end, in characters, of what the assistant says; none where the template does not say."""


class ChatTemplate:
    """Renders turns with the template of a tokenizer. The same turns give the same text on every day."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, name: str) -> None:
        """Take the tokenizer's template.

        Args:
            tokenizer: its template may be one text or several by name, and may be missing.
            name: what people call the tokenizer.
        """
        self._tokenizer, self._name = tokenizer, name

    def render(self, turns: list[Turn], *, tools: Tools | None = None, ask: bool = False) -> Rendered:
        """The turns as text.

        Args:
            turns: of a conversation, from its beginning.
            tools: JSON schemas of the functions that the assistant may call.
            ask: whether the text goes on to where the assistant would speak.

        Raises:
            Unusable: the template refuses the turns.
            UserError: the tokenizer has no template.
        """
        # Not apply_chat_template: its mask ends with the first token of a span's last character, which loses tokens of an
        # emoji there; and where that is the text's first token, the mask goes on to the text's end.
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._text(tools)
        try:
            render: Any = render_jinja_template  # its annotations are of another function
            (text,), spans = render(
                conversations=[turns],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=_SPAN.search(template) is not None,
                add_generation_prompt=ask,
                **self._tokenizer.special_tokens_map,
            )
        # Jinja, its sandbox and the filters raise whatever they like, and a template may raise in any of them.
        except Exception as error:
            raise Unusable(Reason.TEMPLATE, f"the chat template refuses it: {error or type(error).__name__}") from error
        said = tuple((a, b) for a, b in spans[0] if b > a) if spans else ()
        return Rendered(text=text, spans=said)

    def has_spans(self, tools: Tools | None = None) -> bool:
        """Whether the template says what the assistant says."""
        return _SPAN.search(self._text(tools)) is not None

    def check_spans(self, tools: Tools | None = None) -> None:
        """See that the template's spans can be trained on: they hold the assistant's words, and begin where it is asked.

        Raises:
            UserError: names what to add to the template.
        """
        if not self.has_spans(tools):
            raise UserError(f"{self._name}: its chat template has no {{% generation %}} spans; {_ADD_SPANS}")
        question, answer = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}
        try:
            whole = self.render([question, answer], tools=tools)
            asked = self.render([question], tools=tools, ask=True)
        except Unusable as error:
            raise UserError(f"{self._name}: a question and an answer: {error.detail}; mend the template") from error
        said = [whole.text[a:b] for a, b in whole.spans]
        if len(said) != 1 or "Answer" not in said[0] or "Question" in said[0]:
            raise UserError(
                f"{self._name}: its chat template's span holds {said}, not what the assistant says; {_ADD_SPANS}"
            )
        if asked.text != (before := whole.text[: whole.spans[0][0]]):
            raise UserError(
                f"{self._name}: its chat template asks with {asked.text[-60:]!r}, and what is trained on follows "
                f"{before[-60:]!r}: the model would never be asked as it was trained; "
                "begin {% generation %} right where add_generation_prompt ends"
            )

    def check_turn_ends(self, specials: tuple[str, ...]) -> None:
        """See that a span ends with the token that ends the turn: a model that is not trained on it never stops.

        Raises:
            UserError: the span ends before, or there is no such token.
        """
        rendered = self.render([{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}])
        begin, end = rendered.spans[0]
        if not rendered.text[begin:end].rstrip().endswith(specials):
            raise UserError(
                f"{self._name}: its chat template's span ends with {rendered.text[begin:end][-40:]!r}, and no special "
                f"token ends the turn in it; {rendered.text[end:][:40]!r} follows: {_ADD_SPANS}"
            )

    def _text(self, tools: Tools | None) -> str:
        if self._tokenizer.chat_template is None:
            raise UserError(f"{self._name}: has no chat template, and the records are conversations; give it one")
        template: str = self._tokenizer.get_chat_template(None, tools)
        return _CLOCK.sub(lambda call: repr(_DAY.strftime(call[2])), template)
