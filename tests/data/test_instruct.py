import re

import pytest
from instructed import (
    ALPACA,
    ALPACA_PROMPT,
    CHAT,
    CHAT_TEMPLATE,
    END,
    SHAREGPT,
    SHORT,
    SHORT_PROMPT,
    TELLING_TEMPLATE,
    tokenizer_with,
)
from small_tokenizers import trained

from flipproof.data.document import Record
from flipproof.data.instruct import Encoder, recognised
from flipproof.errors import ConfigError

PAD = 257


def encoded(item, format, tokenizer=None, start=(), bos=None, mask_prompt=True):
    encoder = Encoder(format, tokenizer or tokenizer_with(), start, bos, mask_prompt)
    (sample,) = encoder.samples([Record("data.jsonl, line 7", "", lambda: item, 1)])
    return sample


def expected(*parts):
    """(ids, counts) of (text, counts) in turn; END is the end of text."""
    ids, counts = [], []
    for text, counted in parts:
        own = [END] if text is END else list(text.encode())
        ids += own
        counts += [counted] * len(own)
    return ids, counts


def is_sample(sample, *parts):
    """Bytes as the byte-level alphabet numbers them are looked up by the tokenizer itself."""
    ids, counts = expected(*parts)
    known = tokenizer_with().get_vocab()
    from tokenizers import pre_tokenizers

    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain = {byte: known[letters.pre_tokenize_str(chr(byte))[0][0]] for byte in range(128)}
    return sample.ids.tolist() == [plain.get(i, i) for i in ids] and sample.counts.tolist() == counts


def test_formats_are_told_by_their_columns():
    assert recognised(["instruction", "input", "output", "id"]) == "alpaca"
    assert recognised(["prompt", "completion"]) == recognised(["prompt", "response"]) == "prompt_completion"
    assert recognised(["messages", "prompt"]) == recognised(["conversations"]) == "chat"
    assert recognised(["instruction", "title"]) is recognised(["prompt"]) is None


def test_alpaca_is_the_published_prompt_and_the_answer():
    assert is_sample(encoded(ALPACA, "alpaca"), (ALPACA_PROMPT, False), ("3", True), (END, True))
    for item in (SHORT, SHORT | {"input": ""}, SHORT | {"input": None}):
        assert is_sample(encoded(item, "alpaca"), (SHORT_PROMPT, False), ("yes", True), (END, True))


def test_prompt_and_completion_are_as_they_are():
    for key in ("completion", "response"):
        sample = encoded({"prompt": "a b", key: " c {x}"}, "prompt_completion")
        assert is_sample(sample, ("a b", False), (" c {x}", True), (END, True))
    assert is_sample(
        encoded({"prompt": "", "response": "cd"}, "prompt_completion"), ("c", False), ("d", True), (END, True)
    )


def test_of_a_chat_the_assistants_turns_count():
    parts = [
        ("<system>Be short.\n<user>One?\n<assistant>", False), ("two", True), (END, True),
        ("\n<user>Three?\n<assistant>", False), ("four", True), (END, True),
    ]  # fmt: skip
    for template in (CHAT_TEMPLATE, TELLING_TEMPLATE):
        for item in (CHAT, SHAREGPT):
            assert is_sample(encoded(item, "chat", tokenizer_with(template)), *parts, ("\n", False))


def test_without_a_mask_all_but_the_first_token_counts():
    assert is_sample(
        encoded(SHORT, "alpaca", mask_prompt=False), ("B", False), (SHORT_PROMPT[1:] + "yes", True), (END, True)
    )
    sample = encoded(CHAT, "chat", mask_prompt=False)
    assert sample.counts.tolist() == [False] + [True] * (len(sample.ids) - 1)


def test_a_template_without_an_end_is_given_one():
    tokenizer = tokenizer_with(CHAT_TEMPLATE.replace("<|endoftext|>", "."))
    item = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert is_sample(encoded(item, "chat", tokenizer), ("<user>a\n<assistant>", False), ("b.\n", True), (END, True))


@pytest.mark.parametrize("format", ["prompt_completion", "chat"])
def test_a_beginning_is_never_doubled(format):
    prompt = "<|pad|>x" if format == "prompt_completion" else "x"
    tokenizer = tokenizer_with("<|pad|>" + CHAT_TEMPLATE)
    tokenizer.bos_token = "<|pad|>"
    chat = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "y"}]}
    item = {"prompt": prompt, "completion": "y"} if format == "prompt_completion" else chat
    for bos in (None, True):
        ids = encoded(item, format, tokenizer, start=[PAD], bos=bos).ids.tolist()
        assert ids.count(PAD) == 1
        assert ids[0] == PAD


def test_a_beginning_is_added_where_it_is_missing_and_asked_for():
    plain = encoded(CHAT, "chat").ids.tolist()
    assert encoded(CHAT, "chat", start=[PAD], bos=True).ids.tolist() == [PAD, *plain]
    assert encoded(CHAT, "chat", start=[PAD], bos=None).ids.tolist() == plain
    assert encoded(SHORT, "alpaca", start=[PAD]).ids.tolist() == [PAD, *encoded(SHORT, "alpaca").ids.tolist()]


def test_what_has_no_answer_is_no_sample():
    said = [{"role": "user", "content": "a"}]
    assert encoded(SHORT | {"output": " \n"}, "alpaca") is None
    for messages in (said, [*said, {"role": "assistant", "content": ""}], []):
        assert encoded({"messages": messages}, "chat") is None


def test_answers_side_by_side_both_count():
    """Where a template has nothing between them, and does not mark the end of text."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "<|endoftext|>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    said = [("user", "q"), ("assistant", "yes"), ("assistant", "no")]
    item = {"messages": [{"role": role, "content": content} for role, content in said]}
    parts = [("q", False), ("yes", True), (END, True), ("no", True), (END, True)]
    assert is_sample(encoded(item, "chat", tokenizer_with(template)), *parts)


@pytest.mark.parametrize("kind", ["llama2", "metaspace-first"])
def test_an_answer_goes_on_from_its_prompt_as_the_text_does(kind):
    """With tokenizers that put a space before each text, also where the prompt's end is a token with the answer."""
    tokenizer = trained(kind)
    for prompt, answer in (("the cat sat: ", "on the mat"), ("the cat", " sat on"), ("the ca", "t sat")):
        sample = encoded({"prompt": prompt, "completion": answer}, "prompt_completion", tokenizer)
        ids = sample.ids.tolist()
        ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
        whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        said, wanted = ("".join(tokenizer.convert_ids_to_tokens(tokens)) for tokens in (ids, whole))
        assert said == wanted


def test_tokens_do_not_depend_on_the_day():
    template = "{% set day = strftime_now('%d %b %Y') %}{{ day }}" + CHAT_TEMPLATE
    sample = encoded(CHAT, "chat", tokenizer_with(template))
    fixed = encoded(CHAT, "chat", tokenizer_with("26 Jul 2024" + CHAT_TEMPLATE))
    assert sample.ids.tolist() == fixed.ids.tolist()


def test_what_stands_beside_the_messages_counts_too():
    asked = {"from": "human", "value": "One?"}
    told = {"conversations": [asked, {"from": "gpt", "value": "two"}], "system": "Be short."}
    parts = [("<system>Be short.\n<user>One?\n<assistant>", False), ("two", True), (END, True), ("\n", False)]
    assert is_sample(encoded(told, "chat"), *parts)
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    said = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, called]
    item = {"messages": [*said, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "c"}]}
    with_tools = tokenizer_with("{{ tools | length if tools else 'none' }}" + CHAT_TEMPLATE)
    sample = encoded(item | {"tools": [{"name": "f"}]}, "chat", with_tools)
    parts = [
        ("1<user>ab\n<assistant>", False),
        (END, False),
        ("\n<tool>1\n<assistant>", False),
        ("c", True),
        (END, True),
    ]
    assert is_sample(sample, *parts, ("\n", False))
    with pytest.raises(ConfigError, match="tools = 'f'; a list of tools"):
        encoded(item | {"tools": "f"}, "chat", with_tools)


@pytest.mark.parametrize(
    ("item", "format", "said"),
    [
        ({"instruction": "a", "output": 5}, "alpaca", "output = 5; text is allowed"),
        ({"instruction": "a"}, "alpaca", "it has no output"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "alpaca", "input = ['b']"),
        ({"prompt": None, "completion": "c"}, "prompt_completion", "prompt = None"),
        ({"prompt": "p", "response": {"a": "b" * 99}}, "prompt_completion", "response = {'a': 'bbb"),
        ({"messages": None}, "chat", "messages = None; a list"),
        ({"prompt": "p", "messages": None, "conversations": 5}, "chat", "conversations = 5; a list"),
        ({"messages": [{"speaker": "x", "text": "y"}]}, "chat", "message 1: it has no role"),
        ({"messages": "hello"}, "chat", "messages = 'hello'; a list"),
        ({"messages": ["hello"]}, "chat", "message 1: 'hello' is no message"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "chat", "message 1: role = 'bot'; system, user, assistant"),
        ({"messages": [{"role": "user"}]}, "chat", "message 1: it has no content"),
        (
            {"conversations": [{"from": "robot", "value": "x"}]},
            "chat",
            "from = 'robot'; system, user, assistant, tool, developer, human",
        ),
    ],
)
def test_a_malformed_row_is_named_in_one_line(item, format, said):
    with pytest.raises(ConfigError) as error:
        encoded(item, format)
    (line,) = error.value.problems
    assert line.startswith("data.jsonl, line 7")
    assert said in line
    assert "\n" not in line
    assert len(line) < 250


def test_a_chat_needs_a_template_that_tells():
    with pytest.raises(ConfigError, match=r"the tokenizer has no chat template; .*model\.tokenizer"):
        Encoder("chat", tokenizer_with(None), [], None, True).check()
    later = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ConfigError, match=r"line 7: .*otherwise when more follows.*data\.mask_prompt = false"):
        encoded(CHAT, "chat", tokenizer_with(later))
    assert encoded(CHAT, "chat", tokenizer_with(later), mask_prompt=False) is not None
    refuses = "{{ raise_exception('no system here') }}"
    with pytest.raises(
        ConfigError, match=re.escape("line 7: the tokenizer's chat template does not take it: no system")
    ):
        encoded(CHAT, "chat", tokenizer_with(refuses))
