"""What all pages share: the templates with style and script inlined, and names of files."""

import base64
import hashlib
import re
from collections.abc import Collection
from types import CodeType

from jinja2 import BytecodeCache, Environment, PackageLoader, StrictUndefined
from jinja2.bccache import Bucket
from markupsafe import Markup, escape


class CompiledTemplates(BytecodeCache):
    """Keeps the code of templates while the process lives: to compile them takes longer than to write the pages."""

    def __init__(self) -> None:
        self.code: dict[tuple[str, str], CodeType] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """Give a bucket the code that was kept for this source of its template."""
        bucket.code = self.code.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep the code of a bucket."""
        if bucket.code is not None:
            self.code[bucket.key, bucket.checksum] = bucket.code


COMPILED = CompiledTemplates()


def page_templates() -> Environment:
    """Return the templates of all pages, with style and script inlined.

    The pages' content policy allows these two texts and nothing else.
    """
    templates = Environment(loader=PackageLoader("conformance.report"), autoescape=True, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    templates.bytecode_cache = COMPILED
    templates.filters["prose"] = prose
    for kind in ("css", "js"):
        source = templates.get_template(f"page.{kind}").render()
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        templates.globals |= {kind: Markup(source), f"{kind}_hash": digest}
    return templates


def prose(text: str) -> Markup:
    """Return escaped text in which `names` are set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def slug_of(text: str, taken: Collection[str], otherwise: str) -> str:
    """Return a name for a file, of small letters, digits, dots and hyphens, that is not taken.

    Args:
        text: what the name should tell.
        taken: the names that others have.
        otherwise: the name if nothing of the text can be kept.
    """
    stem = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or otherwise
    names = (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)
