"""Run a script of globals from an adapter: with other values for the names at its top level, in a folder of its own."""

import ast
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from conformance.errors import UsageError, quoted

VALUES = "__values_of_the_adapter__"


def run_script(
    path: Path | str,
    arguments: Sequence[object] = (),
    settings: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    files: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a script as its users do, with other values for names at its top level, and return its globals.

    Wherever a statement at the top level of the script binds a name in ``settings`` (``n_layer = 12``, ``def
    get_batch``, ``import``), the name has the value given here from then on. The statement itself still runs. Loops
    and functions are left as they are.

    Args:
        path: of the script.
        arguments: its command line, without its name.
        settings: values by name: numbers, functions, classes.
        folder: the working directory of the run, into which the script then writes; None: as it is.
        files: relative paths of what the script reads (``input.txt``). Each is looked for in the current folder and
            beside the script, and linked into ``folder``.

    Raises:
        UsageError: if the script cannot be read or parsed, or binds none of the names at its top level, or if a file
            that it reads is not there.
        RuntimeError: if the script ends with an exit code other than 0.
    """
    file, values = Path(path).resolve(), dict(settings or {})
    tree = parsed(file)
    missing = values.keys() - set(top_level(tree.body))
    if missing:
        raise UsageError(
            f"{file.name} gives no value to {quoted(sorted(missing))} at its top level, outside loops and functions: "
            "correct the names in the settings of your adapter."
        )
    tree.body = [found for statement in tree.body for found in followed(statement, values.keys())]
    code = compile(ast.fix_missing_locations(tree), str(file), "exec")
    module = types.ModuleType("__main__")
    module.__dict__.update({"__file__": str(file), VALUES: values})
    words = [str(file), *map(str, arguments)]
    sources = Path.cwd(), file.parent
    if folder is not None:
        link(file.name, files, sources, folder)
    replaced = patch.multiple(sys, argv=words, path=[str(file.parent), *sys.path])
    with chdir(folder or Path.cwd()), replaced, patch.dict(sys.modules, {"__main__": module}):
        try:
            exec(code, module.__dict__)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise RuntimeError(f"{file.name} ended with the exit code or message {end.code!r}") from end
        except FileNotFoundError as error:
            name = str(error.filename)
            if folder is None or Path(name).is_absolute() or not any((source / name).exists() for source in sources):
                raise
            raise UsageError(
                f"{file.name} reads {name}, which is not in the folder that it runs in: name it in the adapter's call, "
                f"run_script(..., files=[{name!r}])."
            ) from error
    return module.__dict__


def link(script: str, names: Sequence[str], sources: Sequence[Path], folder: Path) -> None:
    """Link what a script reads into the folder that it runs in, from the first of some folders that has it."""
    for name in names:
        found = next((source / name for source in sources if (source / name).exists()), None)
        if found is None or Path(name).is_absolute():
            raise UsageError(
                f"{script} is said to read {name}, which is neither in the current folder nor beside the script: "
                "correct the relative path in the files of run_script()."
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another rank was first, or an earlier run wrote there
            (folder / name).symlink_to(found.resolve())


def parsed(path: Path) -> ast.Module:
    """Return a script's syntax tree. Raises UsageError if it cannot be read or parsed."""
    try:
        return ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"the script {path} cannot be read: {error.strerror or error}.") from error
    except (SyntaxError, ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UsageError(f"the script {path}{where} is not Python: {getattr(error, 'msg', error)}.") from error


def trains_on_import(tree: ast.Module) -> bool:
    """Return whether a module calls ``backward`` as it is imported: outside functions, or in one that it calls there.

    What stands under ``if __name__ == "__main__"`` does not count.
    """
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    training = {f.name for f in functions if any(is_call_of(node, {"backward"}) for node in ast.walk(f))}
    return any(is_call_of(node, {"backward", *training}) for node in at_once(tree))


def is_call_of(node: ast.AST, names: set[str]) -> bool:
    """Return whether a node calls a function or a method of one of these names."""
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Name | ast.Attribute) and getattr(called, "attr", getattr(called, "id", "")) in names


def at_once(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported."""
    for child in ast.iter_child_nodes(node):
        guarded = isinstance(child, ast.If) and "__main__" in ast.dump(child.test)
        if not guarded and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_once(child)


def followed(statement: ast.stmt, names: Any) -> Iterator[ast.stmt]:
    """Yield a statement, and after it an assignment of the adapter's value to each of the names that it binds."""
    for field in ("body", "orelse", "finalbody"):
        if isinstance(statement, ast.If | ast.Try | ast.With) and getattr(statement, field, None):
            setattr(statement, field, [s for inner in getattr(statement, field) for s in followed(inner, names)])
    yield statement
    for name in bound(statement):
        if name in names:
            again = ast.parse(f"{name} = {VALUES}[{name!r}]").body[0]
            yield ast.copy_location(again, statement)


def top_level(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements bind, also inside if, with and try, but not in loops and functions."""
    for statement in statements:
        yield from bound(statement)
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(statement, field, []))


def bound(statement: ast.stmt) -> Iterator[str]:
    """Yield the names that one statement binds itself."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if not isinstance(statement, ast.AnnAssign) or statement.value is not None:
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
