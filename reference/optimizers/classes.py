"""From a class path to a class of optimizers, importing only a module that can hold it.

Importing a module runs it, and a class path may come from somebody else's config.yaml. So the module's text is looked
at first: it must bind the name, and as something that can be a class.
"""

import ast
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path

from torch.optim import Optimizer

from reference.errors import ConfigurationError, first_line

CLASS_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
LONGEST = 255


def find_class(class_path: str) -> type[Optimizer]:
    """Import the optimizer class and return it.

    Raises:
        ConfigurationError: if there is no optimizer at that path.
    """
    module_name, _, name = class_path.rpartition(".")
    if len(class_path) > LONGEST or not CLASS_PATH.fullmatch(class_path):
        example = f"torch.optim.{class_path}" if class_path.isidentifier() and not module_name else "torch.optim.AdamW"
        shown = class_path if len(class_path) <= LONGEST else f"{class_path[:50]}..."
        raise ConfigurationError(
            f"{shown!r} is not a class path: give module and class, for example '{example[:LONGEST]}'."
        )
    require_candidate(module_name, name)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise unimportable(class_path, error) from error
    found = getattr(module, name, None)
    if found is None:
        raise absent(module_name, name, dir(module))
    if not (inspect.isclass(found) and issubclass(found, Optimizer)):
        raise ConfigurationError(f"{class_path} is not a torch.optim.Optimizer, but {kind_of(found)}.")
    if not callable(found.step):
        raise ConfigurationError(f"{class_path} has no method step(): choose another optimizer.")
    return found


def kind_of(value: object) -> str:
    """Return what something is, in words."""
    if inspect.isclass(value):
        return "another class"
    return "a module" if inspect.ismodule(value) else f"a {type(value).__name__}"


def unimportable(class_path: str, error: BaseException) -> ConfigurationError:
    """Return the error for a module that cannot be imported."""
    kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
    return ConfigurationError(
        f"the optimizer {class_path!r} cannot be imported ({kind}{first_line(error)[:150]}): install its package or "
        "correct the path."
    )


def absent(module_name: str, name: str, names: list[str]) -> ConfigurationError:
    """Return the error for a module that has no such name, with the nearest that it has."""
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {module_name}.{nearest[0]}?" if nearest else "."
    return ConfigurationError(f"{module_name} has no {name!r}{hint}")


def require_candidate(module_name: str, name: str) -> None:
    """Raise ConfigurationError if a module that is not imported yet cannot hold an optimizer of that name."""
    if module_name in sys.modules:
        return
    class_path = f"{module_name}.{name}"
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigurationError(f"{class_path} is not an optimizer: {module_name} is of Python's standard library.")
    spec = find_spec(module_name)
    if spec is None or not isinstance(spec.loader, SourceFileLoader) or spec.origin is None:
        return  # it does not exist, which its import tells best, or has no text
    try:
        bound = dict(bindings(ast.parse(Path(spec.origin).read_bytes())))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as error:
        raise unimportable(class_path, error) from error
    if name in bound:
        if not bound[name]:
            raise ConfigurationError(f"{class_path} is not a torch.optim.Optimizer, but a function.")
    elif "*" not in bound and "__getattr__" not in bound:
        raise absent(module_name, name, list(bound))


def find_spec(module_name: str) -> ModuleSpec | None:
    """Return where a module would be imported from, without importing the packages around it."""
    spec, places = None, None
    parts = module_name.split(".")
    for number in range(len(parts)):
        full = ".".join(parts[: number + 1])
        spec = PathFinder.find_spec(full, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
    return spec


def bindings(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Yield the names that a module binds as it is imported, each with whether it can be a class.

    ``*`` stands for what another module brings, ``__getattr__`` for what a function may find later.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A decorator may turn a function into anything.
            yield node.name, bool(node.decorator_list)
        elif isinstance(node, ast.ClassDef):
            yield node.name, True
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, True
        else:
            yield from bindings(node)
