"""Files and folders that are replaced in one step: under a name lies the old or all of the new.

And whether a folder's work may go on: ``changed_settings``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_file(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file under a name beside its own, bring it to the disk, and rename it.

    Args:
        path: the file; of a link, the file that it leads to. Its folder is made if absent.
        data: all of it; text becomes UTF-8.

    Raises:
        OSError: it cannot be written. What was under that name is as it was, whatever the reason
            of a failure, and no part of the new file is left.
    """
    content = data.encode() if isinstance(data, str) else data
    with replace_file(path) as stream:
        stream.write(content)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an OSError that names no file, such as a full disk's, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """``write_file`` for what is written piece by piece: the file has the name when the block ends.

    Raises:
        OSError: as ``write_file``; so with whatever is raised within the block.
    """
    target, work = _places(path)
    stream = work.open("xb")
    try:
        with naming(target), stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(work, target)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str], option: str = "out") -> None:
    """Find out before long work whether ``write_file`` can put its result there; makes the folder.

    Raises:
        OSError: it cannot; names the option and the file, and says why.
    """
    try:
        _, work = _places(path)
        work.touch(exist_ok=False)
        work.unlink()
    except OSError as error:
        raise OSError(
            f"{option}: expected a file that can be written, got {path}: {error}"
        ) from error


@contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill; when the block ends it gets the name, complete and on the disk, or never.

    Args:
        path: absent, empty or an earlier checkpoint; see ``check_replaceable``.

    Raises:
        FileExistsError, NotADirectoryError: as ``check_replaceable``. After any exception what was
            under that name is as it was.
    """
    target = Path(path)
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        for item in (work, *work.rglob("*")):
            item.chmod(0o755 if item.is_dir() else 0o644)
            sync(item)
        # The old checkpoint is set aside, not deleted, until the new one has its name: a kill in
        # between leaves both, under hidden names beside it.
        aside = work.with_name(work.name + "-old")
        try:
            if target.exists():
                os.replace(target, aside)
            os.replace(work, target)
        except BaseException:
            if aside.exists() and not target.exists():
                os.replace(aside, target)
            raise
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Refuse to replace anything but an earlier checkpoint (or an empty folder).

    Raises:
        FileExistsError: it holds other files.
        NotADirectoryError: it, or what it would be in, is no folder.
    """
    for place in (target, *target.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(
                f"output: expected a new, empty or checkpoint directory, got {target}; "
                f"{place} is a file"
            )
    earlier = any((target / name).is_file() for name in ("config.json", "adapter_config.json"))
    if target.exists() and not earlier and any(target.iterdir()):
        raise FileExistsError(
            f"output: expected a new, empty or checkpoint directory, got {target}, which holds "
            "other files"
        )


def changed_settings(
    before: Mapping[str, Any], settings: Mapping[str, Any], free: Container[str] = ()
) -> list[str]:
    """Names of the settings that are not what they were, in alphabetical order.

    Args:
        before: as a JSON file had them.
        settings: as JSON can hold them.
        free: names of those that may change.
    """
    now = json.loads(json.dumps(settings))
    return sorted(name for name in now if name not in free and before.get(name) != now[name])


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file to replace, and a name beside it that is free; the folder is made."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError("it is a folder")
    if target.exists() and not target.is_file():
        raise OSError("it is a device or a pipe, not an ordinary file")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target, target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
