"""Instruction and chat data: rows of a table to samples, which are tokens and which of them have a loss.

**Formats**, told by their columns where there is no column of text:

- ``alpaca``: instruction, input (or none), output, in the prompt of Stanford Alpaca (Taori et al., 2023), whatever chat
  template a tokenizer has: the format is its prompt.
- ``prompt_completion``: prompt, and completion or response; both as they are, nothing between them.
- ``chat``: messages (role, content), or conversations (from, value) of ShareGPT, in the tokenizer's chat template.

**What has a loss.** The answer and the end-of-text token after it; of a chat each turn of the assistant; without
``mask_prompt`` everything. Never a sample's first token, which nothing comes before. Which tokens of a chat are the
assistant's a template may say itself ({% generation %}). Otherwise the chat is rendered as far as each answer begins
and as far as it ends: each of these texts must be the beginning of the next, and what is between is the answer.

**Tokens** of a prompt are those that it has alone, as when a model is asked; an answer goes on from there with the
tokens of the whole where these begin with the prompt's, else with its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError

from flipproof.data.chunks import CONTEXT
from flipproof.data.document import Row
from flipproof.errors import ConfigError

Format = Literal["alpaca", "prompt_completion", "chat"]

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "developer"}
_SHAREGPT = _ROLES | {"human": "user", "gpt": "assistant"}
_DAY = date(2024, 7, 26)  # which Llama 3's template has where it cannot ask
_CODES = ("-d", *"aAbBdHIjmMpSUwyY")  # of strftime
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Sample(NamedTuple):
    """Tokens of a sample."""

    ids: np.ndarray
    """int32, shape (n,)."""
    counts: np.ndarray
    """bool, shape (n,): which of them have a loss."""


class _Part(NamedTuple):
    """A part of a sample's text."""

    text: str
    counts: bool


def recognised(columns: Iterable[str]) -> Format | None:
    """The format of a table with these columns; None where it is none."""
    names = set(columns)
    if names & {"messages", "conversations"}:
        return "chat"
    if names >= {"instruction", "output"}:
        return "alpaca"
    if "prompt" in names and names & {"completion", "response"}:
        return "prompt_completion"
    return None


@dataclass(frozen=True)
class Encoder:
    """How the rows of one format become samples."""

    format: Format
    tokenizer: Any
    start: Sequence[int]
    """What a text begins with: of a chat only where ``bos`` asks for it, since templates have their own."""
    bos: bool | None
    mask_prompt: bool

    def check(self) -> None:
        """Raises ConfigError for chats where the tokenizer has no chat template."""
        if self.format == "chat" and not self.tokenizer.chat_template:
            raise ConfigError(
                [
                    "data.format = 'chat': the tokenizer has no chat template; take one that has (model.tokenizer), or "
                    "write prompt and completion as columns"
                ]
            )

    def samples(self, rows: Sequence[Row]) -> list[Sample | None]:
        """One for each row; None where it has no answer, or a blank one.

        Raises:
            ConfigError: for a row that is not of the format, and a chat whose answers cannot be told.
        """
        if self._template_tells:
            return [self._by_template(row) for row in rows]
        told = [self._parts(row) for row in rows]
        texts = [["".join(p.text for p in parts[: k + 1]) for k in range(len(parts))] for parts in told]
        encoded = iter(self._tokens([text for of_row in texts for text in of_row]))
        return [self._joined(parts, [next(encoded) for _ in parts]) if parts else None for parts in told]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _joined(self, parts: list[_Part], encoded: list[list[int]]) -> Sample:
        """``encoded``: of each part the tokens of the text up to its end."""
        ids: list[int] = []
        counts: list[bool] = []
        for part, whole in zip(parts, encoded, strict=True):
            own = whole[len(ids) :] if whole[: len(ids)] == ids else self._after_others(part.text)
            ids = ids + own
            counts += [part.counts] * len(own)
        return self._finished(ids, counts)

    def _after_others(self, text: str) -> list[int]:
        """Tokens of a text that does not begin one: without the space that some tokenizers put before a text."""
        context, whole = self._tokens([CONTEXT, CONTEXT + text])
        return whole[len(context) :] if whole[: len(context)] == context else self._tokens([text])[0]

    def _finished(self, ids: list[int], counts: list[bool]) -> Sample:
        """With its beginning, and with the end-of-text token after each answer."""
        ids, counts = self._ended(ids, counts)
        if self.format != "chat" or self.bos:
            if self.start and ids[: len(self.start)] != list(self.start):
                ids, counts = [*self.start, *ids], [False] * len(self.start) + counts
        elif self.bos is False and ids[:1] == [self.tokenizer.bos_token_id]:
            ids, counts = ids[1:], counts[1:]
        return Sample(np.array(ids, dtype=np.int32), np.array([False, *counts[1:]]))

    def _ended(self, ids: list[int], counts: list[bool]) -> tuple[list[int], list[bool]]:
        """An answer ends with the end-of-text token where it holds one (templates put a line end after it, which no
        model has to say), and includes the one that follows it; a sample without one at its end is given it."""
        end = self.tokenizer.eos_token_id
        if end is None or not self.mask_prompt:
            whole = end is None or end in ids[-2:]
            return (ids, counts) if whole else ([*ids, end], [*counts, True])
        counts = list(counts)
        begin = 0
        while True in counts[begin:]:
            first = counts.index(True, begin)
            begin = next((i for i in range(first, len(ids)) if not counts[i]), len(ids))
            last = next((i for i in range(begin - 1, first - 1, -1) if ids[i] == end), None)
            if last is not None:
                counts[last + 1 : begin] = [False] * (begin - last - 1)
            elif begin == len(ids):
                return [*ids, end], [*counts, True]
            elif ids[begin] == end:
                counts[begin] = True
                begin += 1  # what follows is another answer
        return ids, counts

    # -- rows to texts -------------------------------------------------------------------------------------------------

    def _parts(self, row: Row) -> list[_Part]:
        """The parts of a sample's text; none where it has no answer."""
        item = row.item()
        if self.format == "chat":
            return self._chat(_messages(item, row.where), row.where, _tools(item, row.where))
        if self.format == "alpaca":
            given = {key: _text(item, key, row.where) for key in ("instruction", "output")}
            given["input"] = _text(item, "input", row.where) if item.get("input") is not None else ""
            template = _ALPACA_WITH_INPUT if given["input"] else _ALPACA
            prompt, answer = template.format(**given), given["output"]
        else:
            prompt = _text(item, "prompt", row.where)
            key = "completion" if item.get("completion") is not None or "response" not in item else "response"
            answer = _text(item, key, row.where)
        if not answer.strip():
            return []
        parts = [_Part(prompt, not self.mask_prompt), _Part(answer, True)]
        return [part for part in parts if part.text]

    def _chat(self, messages: list[dict[str, Any]], where: str, tools: dict[str, Any]) -> list[_Part]:
        if not messages:
            return []
        if not self.mask_prompt:
            return [_Part(self._rendered(messages, where, **tools), True)]
        parts: list[_Part] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendered(messages[:i], where, add_generation_prompt=True, **tools) if i else ""
            after = self._rendered(messages[: i + 1], where, **tools)
            if not (before.startswith(done) and after.startswith(before)):
                raise ConfigError(
                    [
                        f"{where}: the tokenizer's chat template renders the beginning of a chat otherwise when more "
                        "follows, so that the assistant's tokens cannot be told; mark them in it with "
                        "{% generation %}, or set data.mask_prompt = false"
                    ]
                )
            # a turn that says nothing is not learnt
            parts += [_Part(before[len(done) :], False), _Part(after[len(before) :], bool(message["content"].strip()))]
            done = after
        return [part for part in parts if part.text]

    def _rendered(self, messages: list[dict[str, Any]], where: str, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, chat_template=self._template, **{"tokenize": False, **how}
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            what = " ".join(str(error).split())[:200]
            raise ConfigError([f"{where}: the tokenizer's chat template does not take it: {what}"]) from error

    @cached_property
    def _template_tells(self) -> bool:
        """Whether the chat template marks what the assistant says."""
        if self.format != "chat" or not self.mask_prompt:
            return False
        return bool(_GENERATION.search(self._template))

    @cached_property
    def _template(self) -> str:
        """The tokenizer's. Some write today's date, and tokens are not to depend on the day: it is a fixed one."""
        template: str = self.tokenizer.get_chat_template()
        if "strftime_now" not in template:
            return template
        codes = "".join(f"|replace('%{code}', '{_DAY.strftime('%' + code)}')" for code in _CODES)
        return f"{{% macro strftime_now(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}{template}"

    def _by_template(self, row: Row) -> Sample | None:
        messages = _messages(row.item(), row.where)
        if not messages:
            return None
        how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        how |= _tools(row.item(), row.where)
        told = self._rendered(messages, row.where, **how)
        counts = [bool(told_here) for told_here in told["assistant_masks"]]
        return self._finished(list(told["input_ids"]), counts) if any(counts) else None


def _tools(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a template is told of the tools that a chat may call."""
    tools = item.get("tools")
    if tools is None:
        return {}
    if not isinstance(tools, list):
        raise ConfigError([f"{where}: {_seen(item, 'tools')}; a list of tools is allowed"])
    return {"tools": tools}


def _messages(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of a chat up to the assistant's last, with the keys of a template; none where it says nothing."""
    column = next((c for c in ("messages", "conversations") if item.get(c) is not None), None)
    column = column or ("conversations" if "conversations" in item else "messages")
    given = item.get(column)
    if not isinstance(given, list):
        raise ConfigError([f"{where}: {_seen(item, column)}; a list of messages is allowed"])
    messages: list[dict[str, Any]] = []
    if column == "conversations" and item.get("system"):  # ShareGPT's has a column of its own
        messages.append({"role": "system", "content": _text(item, "system", where)})
    for number, message in enumerate(given, 1):
        of = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise ConfigError([f"{of}: {_short(message)} is no message; an object with role and content is allowed"])
        plain = "role" in message or "from" not in message
        role_key, text_key, roles = ("role", "content", _ROLES) if plain else ("from", "value", _SHAREGPT)
        if not isinstance(role := message.get(role_key), str) or role not in roles:
            raise ConfigError([f"{of}: {_seen(message, role_key)}; {', '.join(roles)} are allowed"])
        text = _content(message, text_key, of)
        more = {key: value for key, value in message.items() if plain and value is not None}
        messages.append({**more, "role": roles[role], "content": text})
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"].strip()]
    return messages[: said[-1] + 1] if said else []


def _content(message: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a message, which may come in parts, or be none where it calls a tool."""
    value = message.get(key)
    if value is None and message.get("tool_calls"):
        return ""
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(_text(part, "text", where) for part in value)
    return _text(message, key, where)


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise ConfigError([f"{where}: {_seen(item, key)}; text is allowed"])
    # halves of surrogate pairs, which JSON can hold and text cannot
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _seen(item: Mapping[str, Any], key: str) -> str:
    return f"{key} = {_short(item[key])}" if key in item else f"it has no {key}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
