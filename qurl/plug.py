"""Plug points: a name in a table, or `package.module:attribute` of somebody else's code."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def resolve(table: Mapping[str, T], name: str, key: str) -> T:
    """The entry `name` of `table`, or what `package.module:attribute` or `path/to/file.py:attribute` names.

    key: the configuration key that holds `name`, for the error. Raises ValueError where nothing answers to the name."""
    if name in table:
        return table[name]
    module_name, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(f"{key}={name!r} is unknown; use one of {', '.join(sorted(table))}, or package.module:attribute")
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # trust boundary: somebody's module may raise anything while it is imported
        raise ValueError(
            f"{key}={name!r}: cannot import {module_name!r} from this folder ({type(error).__name__}: {error})"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{key}={name!r}: {module_name!r} has no attribute {attribute!r}")
    return getattr(module, attribute)


def _load_file(path: Path):
    """Import one file under a name of its own. Raises OSError where it does not exist."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise OSError(f"no file {path}")
    name = f"qurl_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    sys.path.insert(0, folder)  # the file imports its neighbors as a script does
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # half a module must not answer the next call
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # what it imports later; behind everything else, so that `utils` stays somebody else's
    return module
