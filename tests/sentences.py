"""What a user is told of a mistake: one sentence."""

from collections.abc import Callable
from typing import Any

import pytest


def sentence_of(kind: type[Exception], action: Callable[[], Any]) -> str:
    """The message of the error that ``action`` raises: one line, ended, free of terminal codes."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert message.endswith(".")
    return message
