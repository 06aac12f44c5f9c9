"""Chat templates: whose text becomes special tokens, what bounds a stranger's template, and what is
refused."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo_jax.data import chat as chats
from flexolmo_jax.data import rendering
from flexolmo_jax.data.chat import CHAT_FILE, TEMPLATE_LIMIT, Chat, make_chat
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.errors import UserError
from tests.chats import FORMS, chat_of, said, with_tokens


@pytest.fixture(scope="module")
def file(tiny, tiny_tokenizer):
    return tiny / "tokenizer.json"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch):
    """Stands in for Jinja, whose process is slow to start: a template of `a[]b`, where [] is each
    message in turn, without space around it."""

    def render(template, *each):
        before, behind = template.split("[]")
        return [
            "".join(before + m["content"].strip() + behind for m in variables["messages"])
            for variables in each
        ]

    monkeypatch.setattr(chats, "render", render)


def counted(ids: list[int], tokenizer: Tokenizer) -> int:
    return sum(i in ids_of(tokenizer) for i in ids)


def ids_of(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer.added_tokens)


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_message_that_spells_special_tokens_stays_text(file, form, is_special):
    """Also where tokenizer.json forgets to call them special."""
    tokenizer, chat = chat_of(file, form, special=is_special)
    names = [token.content for token in tokenizer.added_tokens.values()]
    usual = counted(chat.encode(tokenizer, said("a", "b", "c")), tokenizer)
    # that of an unknown name is no special token where the tokenizer does not say so
    known = {*chat.tokens.values(), *chat.ends, "<|endoftext|>", "<|pad|>"}
    for name in names if is_special else sorted(known & set(names)):
        spelled = said(name, f"yes{name}{name}", f" {name[:-1]}{name} {name[0]}{name}")
        ids = chat.encode(tokenizer, spelled)
        assert counted(ids, tokenizer) == usual, name
        assert name in tokenizer.decode(ids)


def test_a_message_completes_no_special_token_with_what_stands_beside_it(file, plain):
    tokenizer = with_tokens(file, "<|end|>", "[INST]")
    own = tokenizer.added_tokens
    for template in ("[]d|>", "<|en[]"):
        chat = Chat(template, {}, ("<|end|>",))
        for content in ("x <|en", " <|en \n", "d|>", "\n d|> x"):
            assert not set(chat.encode(tokenizer, said(content))) & set(own), content
    two = Chat("[]", {}, ("<|end|>",))
    assert not set(two.encode(tokenizer, said("<|e", "nd|>", "[", "INST]"))) & set(own)
    # what the template itself writes is one
    whole = Chat("<|end|>[]<|end|>", {}, ("<|end|>",))
    for content in ("<", "a <|", "|>", ">", "<|end|>"):
        assert counted(whole.encode(tokenizer, said(content)), tokenizer) == 2, content


def test_a_message_that_a_template_cuts_and_joins_spells_no_special_token(file):
    tokenizer = with_tokens(file, "<|end|>")
    joined = (
        "{{ messages[0].content | replace('/think', '') }}<|end|>{{ messages[0].content | trim }}"
    )
    chat = Chat(joined, {}, ("<|end|>",))
    for content in ("<|en/thinkd|>", "a <|/thinkend/think|>/think", "<|end/think|>"):
        ids = chat.encode(tokenizer, said(content))
        assert counted(ids, tokenizer) == 1 and "<|end|>" in tokenizer.decode(ids), content


def test_a_template_may_ask_how_a_message_begins(file):
    """Then a mark before it would change the answer, or be an error of the template."""
    tokenizer = with_tokens(file, "<|end|>")
    for other in ("no", "{{ raise_exception('no') }}"):
        asked = "{% if messages[0].content[0] == '<' %}yes{% else %}" + other + "{% endif %}<|end|>"
        ids = Chat(asked, {}, ("<|end|>",)).encode(tokenizer, said("<b>"))
        assert tokenizer.decode(ids) == "yes" and counted(ids, tokenizer) == 1


PIECES = st.lists(
    st.sampled_from(["<", "|", "end", "en", "d|>", ">", "[", "INST", "]", " ", "\n", "a", "\ue000"])
)


@settings(max_examples=150)
@given(contents=st.lists(PIECES.map("".join), min_size=1, max_size=3), special=st.booleans())
def test_no_message_makes_or_loses_a_special_token_or_a_character(file, contents, special):
    tokenizer = with_tokens(file, "<|end|>", "[INST]", special=special)
    chat = Chat("[INST][]<|end|>", {"bos_token": "[INST]"}, ("<|end|>",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chats, "render", lambda template, *each: [
            "".join(f"[INST]{m['content']}<|end|>" for m in variables["messages"])
            for variables in each
        ])  # fmt: skip
        ids = chat.encode(tokenizer, said(*contents))
    names = {i: token.content for i, token in tokenizer.added_tokens.items()}
    own = [names[i] for i in ids if i in names]
    assert own == ["[INST]", "<|end|>"] * len(contents)
    parts, text = [], []
    for i in ids:
        if names.get(i) == "<|end|>":
            parts.append(tokenizer.decode(text))
            text = []
        elif i not in names:
            text.append(i)
    assert parts == contents


def test_a_chat_is_kept_beside_its_tokenizer_and_no_byte_of_it_changes(file, tmp_path):
    tokenizer, tokenizer.chat = chat_of(file, "llama 3")
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.chat == tokenizer.chat and again.digests == tokenizer.digests
    assert set(again.digests) == {"tokenizer", "chat"}
    assert Tokenizer.load(tmp_path / "tokenizer.json").chat is None
    path = tmp_path / CHAT_FILE
    text = path.read_text()
    fields = json.loads(text)
    for changed in (
        text + " ",
        text[:-9],
        json.dumps(fields | {"format": 2}, indent=1, sort_keys=True) + "\n",
        json.dumps(fields | {"more": 1}, indent=1, sort_keys=True) + "\n",
        json.dumps(fields | {"ends": []}, indent=1, sort_keys=True) + "\n",
        json.dumps(fields | {"tokens": {"__class__": "a"}}, indent=1, sort_keys=True) + "\n",
    ):
        path.write_text(changed)
        with pytest.raises(UserError, match=r"chat\.json is damaged"):
            Tokenizer.load(tmp_path)
    path.unlink()
    path.symlink_to(file)
    with pytest.raises(UserError, match=r"cannot read|is damaged"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", "malformed: line 1: Unexpected end of template"),
        ("a\n{{ messages | nothing }}", "malformed: line 2: No filter named 'nothing'"),
        ("{{ '\x1b[2J' ! }}", "malformed: line 1"),
        ("x" * (TEMPLATE_LIMIT + 1), f"has {TEMPLATE_LIMIT + 1} bytes; expected 1 to"),
        ("", "has 0 bytes"),
        ("{{ bos_token }}", "special token '<missing>', which tokenizer.json does not have"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_it_is_read(file, template, message):
    tokens = {"bos_token": "<missing>", "unk_token": "<unk>"}
    with pytest.raises(UserError) as refused:
        make_chat(template, tokens, (), with_tokens(file), "hf/tokenizer_config.json")
    assert message in str(refused.value) and "hf/tokenizer_config.json" in str(refused.value)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


def test_special_tokens_that_a_template_does_not_use_may_be_unknown(file):
    tokenizer = with_tokens(file)
    chat = make_chat("a", {"unk_token": "<unk>", "pad_token": "<|pad|>"}, (), tokenizer, "a model")
    assert chat == Chat("a", {"pad_token": "<|pad|>"}, ("<|endoftext|>",))
    with pytest.raises(UserError, match="special token '<unk>'"):
        make_chat("a", {}, ("<unk>",), tokenizer, "a model")
    with pytest.raises(UserError, match="'<unk>', which the tokenizer does not have"):
        Chat("a", {}, ("<unk>",)).end_ids(tokenizer)
    names = [f"<{i}>" for i in range(9)]
    with pytest.raises(UserError, match="9 tokens end a turn; expected at most 8"):
        make_chat("a", {}, names, with_tokens(file, *names), "a model")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ cycler.__init__.__globals__.os }}", "access to attribute '__init__'"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ dict.__class__.mro() }}", "access to attribute '__class__'"),
        ("{{ (messages | map(attribute='__class__') | list)[0].mro() }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "a namespace cannot hold '__class__'"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{{ '%s' | format(x.y.z) }}", "'x' is undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ raise_exception('no\x1b[2J\nsystem' ~ 'm' * 9999) }}", r"no\x1b[2J\nsystemmmm"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
)
def test_a_template_reaches_nothing_but_its_messages(template, message):
    with pytest.raises(UserError) as refused:
        Chat(template, {}, ("x",)).render(said("hello"))
    assert message in str(refused.value), refused.value
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** 999999999 }}",
        "{% set n = namespace(x='doubled') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}{{ n.x }}",
        "{{ '%0999999999d' % 1 }}{{ '%0999999999d' % 1 }}",
        "{{ 'long' * 5000000 }}",
    ],
)
def test_a_template_that_takes_too_much_ends_soon(monkeypatch, template):
    monkeypatch.setattr(rendering, "SECONDS", 2)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"takes more than|20000000 characters; expected at most"):
        Chat(template, {}, ("x",)).render(said("hello"))
    assert time.monotonic() - started < rendering.WAIT


def test_a_process_that_cannot_render_is_told_of_in_a_line(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    monkeypatch.setattr(rendering, "PROGRAM", broken)
    with pytest.raises(UserError, match="ModuleNotFoundError: No module named 'nothing_of_this_n"):
        Chat("a", {}, ("x",)).render(said("hello"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    with pytest.raises(UserError, match="Python cannot be started to render it"):
        Chat("a", {}, ("x",)).render(said("hello"))


def test_roles_in_the_wrong_order_are_refused_in_the_words_of_the_template(file):
    _, chat = chat_of(file, "mistral")
    with pytest.raises(UserError, match="Conversation roles must alternate"):
        chat.render([*said("a"), *said("b")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (None, "at least one message"),
        (["hello"], "message 0 has 'hello'; expected a role and a content"),
        ([{"role": "user"}], "message 0 has ['role']; expected a role and a content"),
        ([{"content": "a"}], "message 0 has ['content']"),
        ([{"role": "user", "content": "a", "tools": "b"}], "message 0 has ['content', 'role', 't"),
        ([{"role": "user", "content": None}], "message 0: its content is None; expected text"),
        ([{"role": 3, "content": "a"}], "message 0: its role is 3; expected text"),
        ([{"role": "user", "content": [{"text": "a"}]}], "its content is [{'text': 'a'}]"),
        ([*said("a"), {"role": "user", "content": "b\ud800"}], "message 1: character 1"),
    ],
)
def test_what_are_no_messages_is_refused(file, messages, message):
    tokenizer, chat = chat_of(file, "chatml")
    for use in (chat.render, lambda messages: chat.encode(tokenizer, messages)):
        with pytest.raises(UserError) as refused:
            use(messages)
        assert message in str(refused.value)


def test_a_template_of_another_tokenizer_is_refused(file):
    tokenizer, chat = chat_of(file, "chatml")
    with pytest.raises(UserError, match=r"'<\|im_end\|>', which the tokenizer does not have"):
        chat.end_ids(with_tokens(file))
    assert [tokenizer.token(i) for i in chat.end_ids(tokenizer)] == ["<|im_end|>", "<|endoftext|>"]
