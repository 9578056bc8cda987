"""Chats as documents: rendered by the tokenizer's own chat template, with targets in the assistant's turns only.

The template lies beside tokenizer.json: ``chat_template.jinja``, or ``chat_template`` in ``tokenizer_config.json``. It
is rendered in a sandbox, as https://huggingface.co/docs/transformers/chat_templating says. The assistant's turns stand
between ``{% generation %}`` and ``{% endgeneration %}``. A template without these marks is rendered turn by turn:
a turn is what it adds to the text before it and to the prompt for its generation.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reference.data.timelimit import time_limit
from reference.data.tokenizer import TEMPLATE, FileTokenizer, Tokenizer
from reference.errors import ConfigurationError, DataError, first_line
from reference.files import read_file, read_json

if TYPE_CHECKING:
    from jinja2 import Template

CONFIG = "tokenizer_config.json"
PATIENCE = 5.0  # seconds that a template may take for a conversation
LONGEST = 1 << 26  # characters that it may write
Message = dict[str, Any]


class Unsuited(Exception):
    """A conversation that must be left out; the message is the reason."""


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Where the assistant speaks: first character, and the one behind the last."""
    said: str
    """What the messages say, without what the template adds."""

    def dumped(self) -> bytes:
        """Return it as bytes."""
        return json.dumps([self.text, self.spans, self.said]).encode()

    @classmethod
    def loaded(cls, content: bytes | str) -> "Conversation":
        """Return what :meth:`dumped` made bytes of."""
        text, spans, said = json.loads(content)
        return cls(text, tuple((start, stop) for start, stop in spans), said)


def config_in(folder: Path) -> dict[str, Any]:
    """Return what a folder's tokenizer_config.json says; nothing if it is not there."""
    path = folder / CONFIG
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): get it again.") from error


def template_in(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the chat template of a folder, of several the one called default; or None.

    Args:
        folder: of the tokenizer.
        config: what its tokenizer_config.json says.
    """
    found = config.get("chat_template")
    if (folder / TEMPLATE).is_file():
        found = read_file(folder / TEMPLATE).decode(errors="replace")
    if isinstance(found, list):
        found = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}.get("default")
    return found if isinstance(found, str) else None


class ChatTemplate:
    """The chat template beside a tokenizer.json.

    Args:
        tokenizer: of this file.
        source: its path, or its folder.

    Raises:
        ConfigurationError: if the tokenizer is not a tokenizer.json, or has no template that can be read.
    """

    def __init__(self, tokenizer: Tokenizer | None, source: str) -> None:
        if not isinstance(tokenizer, FileTokenizer):
            raise ConfigurationError(
                f"chat messages need a tokenizer with a chat template, and {source} has none: give the tokenizer.json "
                f"of a chat model, with its {CONFIG} beside it."
            )
        self.tokenizer = tokenizer
        self.folder = Path(source) if Path(source).is_dir() else Path(source).parent
        self.config = config_in(self.folder)
        self.text = self.read_text()
        self.marks = f"\ue000{secrets.token_hex(8)}(", f"\ue000{secrets.token_hex(8)})"
        self.template = self.compiled()
        added = [token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values() if token.special]
        self.special = [token for token in added if token]

    def read_text(self) -> str:
        """Return the template. Raises ConfigurationError if there is none."""
        found = template_in(self.folder, self.config)
        if found is None:
            raise ConfigurationError(
                f"{self.folder} has no chat template ({TEMPLATE}, or chat_template in {CONFIG}): get these files of "
                "the model whose tokenizer this is, or write each conversation as one text."
            )
        return found

    def compiled(self) -> "Template":
        """Return the template, in a sandbox."""
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        first, last = self.marks

        class Generation(Extension):
            """``{% generation %}``: what the assistant says."""

            tags = {"generation"}

            def parse(self, parser: Any) -> list[nodes.Node]:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                marked = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (first, last)]
                return [marked[0], *body, marked[1]]

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime(2000, 1, 1).strftime(form)  # the same every day
        try:
            with time_limit(PATIENCE):
                return environment.from_string(self.text)
        except Exception as error:  # what is nested too deeply, too, and what takes too long
            said = first_line(error)[:100].rstrip(".") if isinstance(error, TemplateError) else type(error).__name__
            raise ConfigurationError(
                f"the chat template in {self.folder} is not a template of Jinja ({said}): get it again."
            ) from error

    def rendered(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """Return messages as text, with marks; ``prompt``: ends where the assistant begins to speak.

        Raises:
            Unsuited: if the template fails on the messages. It is a program, which may raise anything.
            DataError: if it takes too long, or writes too much.
        """
        from jinja2 import TemplateError

        tokens = {name: token_text(value) for name, value in self.config.items() if name.endswith("_token")}
        try:
            with time_limit(PATIENCE):
                text = self.template.render(messages=list(messages), add_generation_prompt=prompt, **tokens)
        except TimeoutError as error:
            raise DataError(f"the chat template in {self.folder} does not end ({error}): get it again.") from error
        except TemplateError as error:
            raise Unsuited(f"the chat template refuses it: {first_line(error)[:80].rstrip('.')}") from error
        except Exception as error:
            raise Unsuited(f"the chat template fails on it: {type(error).__name__}") from error
        if len(text) > LONGEST:
            raise DataError(
                f"the chat template in {self.folder} writes {len(text):,} characters for a conversation, but at most "
                f"{LONGEST:,} are allowed: get it again."
            )
        return text

    def conversation(self, messages: Any) -> Conversation:
        """Return a conversation as text, and where the assistant speaks in it.

        Raises:
            Unsuited: if it is no list of messages, or the template refuses it.
            DataError: if the template does not show where a turn begins.
        """
        check_messages(messages)
        said = " ".join(m["content"] for m in messages if isinstance(m.get("content"), str))
        # The template's own special tokens are encoded as such. The same characters in a message would be, too.
        if inside := next((token for token in self.special if token in said), None):
            raise Unsuited(f"a message holds the text of the special token {inside}")
        text, spans = self.unmarked(self.rendered(messages))
        if "generation" not in self.text or not spans:
            spans = tuple(self.turns(messages, text))
        if not any(start < stop for start, stop in spans):
            raise Unsuited("no turn of the assistant")
        return Conversation(text, spans, said)

    def unmarked(self, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return a rendered text without the marks of the assistant's turns, and where these stood."""
        first, last = self.marks
        parts, spans, place = text.split(first), [], 0
        place = len(parts[0])
        for part in parts[1:]:
            inside, _, _ = part.partition(last)
            spans.append((place, place + len(inside)))
            place += len(part.replace(last, ""))
        return text.replace(first, "").replace(last, ""), tuple(spans)

    def turns(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, int]]:
        """Yield where the assistant's turns stand in a text, found by rendering it turn by turn."""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise Unsuited("it begins with the assistant")
            before = self.rendered(messages[:number], prompt=True)
            upto = self.rendered(messages[: number + 1])
            if not (upto.startswith(before) and text.startswith(upto)):
                raise DataError(
                    f"the chat template in {self.folder} does not show where the assistant's turns begin: what it "
                    "writes for some messages is not the beginning of what it writes for more. Mark the turns in it "
                    "with {% generation %} and {% endgeneration %}."
                )
            yield len(before), len(upto)

    def encoded(self, conversation: Conversation) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return ids and, for each, whether it is a target: whether its first character is the assistant's."""
        ids, starts = self.tokenizer.encode_with_special(conversation.text)
        targets = np.zeros(len(ids), np.bool_)
        for start, stop in conversation.spans:
            targets |= (starts >= start) & (starts < stop)
        return ids, targets


def check_messages(messages: Any) -> None:
    """Raise Unsuited unless these are messages, each with a role."""
    if not isinstance(messages, list) or not messages:
        raise Unsuited("no list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Unsuited("a message without a role")


def refuse(message: object) -> None:
    """Raise what a template wants to tell: ``raise_exception`` of templates."""
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def token_text(value: Any) -> str:
    """Return the text of a token in tokenizer_config.json: a text, or a description with it."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""
