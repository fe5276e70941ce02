"""Options of several commands, and configuration classes as options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from zo_kernels.files import changed_settings
from zo_kernels.pipeline.settings import fits, numbered


def add_model(
    command: argparse.ArgumentParser, data: str = "", *, auto: str = "fast on the device"
) -> None:
    """Options that name a model, its data and where it runs.

    Args:
        command: which gets them.
        data: what its data is, where none is built in.
        auto: what --dtype auto is.
    """
    command.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    builtin = "JSON lines: prompt, completion, kind (default: built in)"
    command.add_argument("--data", type=Path, required=bool(data), help=data or builtin)
    command.add_argument(
        "--dtype", default="auto", help=f"auto ({auto}), float32, bfloat16, float16"
    )
    command.add_argument("--device", default="cpu", help="torch device")
    command.add_argument("--max-length", type=int, default=512, help="tokens of one example")


def add_options(
    command: argparse.ArgumentParser, module: str, name: str, skip: Sequence[str] = ()
) -> None:
    """One option per field of a configuration class, with its default and its documentation."""
    kind = _configuration(module, name)
    texts = _attribute_texts(kind.__doc__ or "")
    for field in fields(kind):
        if field.name in skip:
            continue
        default = None if field.default is MISSING else field.default
        flag = "--" + field.name.replace("_", "-")
        text = texts.get(field.name, "").replace("%", "%%")
        if isinstance(default, bool):
            command.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=default, help=text
            )
        elif "tuple" in str(field.type):
            item = _item_type(str(field.type))
            command.add_argument(flag, nargs="*", type=item, default=default, help=text)
        else:
            item = _item_type(str(field.type))
            command.add_argument(flag, type=item, default=default, help=text)


def _item_type(annotation: str) -> Callable[[str], Any]:
    """What turns an option's text into a value of a field's type."""
    if "float" in annotation:
        return number_or_word if "str" in annotation else float
    return int if "int" in annotation else str


def number_or_word(text: str) -> float | str:
    """A number if the text is one, else the text, such as "auto"."""
    try:
        return float(text)
    except ValueError:
        return text


def _configuration(module: str, name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(module), name)


def _attribute_texts(doc: str) -> dict[str, str]:
    """name -> text of the "Attributes:" section of a docstring."""
    texts: dict[str, str] = {}
    current = None
    for line in doc.partition("Attributes:")[2].splitlines():
        name, colon, rest = line.strip().partition(": ")
        if colon and all(part.strip().isidentifier() for part in name.split(",")):
            for part in name.split(","):
                current = part.strip()
                texts[current] = rest
        elif current and line.strip():
            texts[current] += " " + line.strip()
    return texts


def read(options: argparse.Namespace, module: str, name: str) -> Any:
    """The configuration that the options give."""
    kind = _configuration(module, name)
    values = {f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_suite(
    path: Path,
    module: str,
    name: str,
    *,
    files: Sequence[str],
    lists: Sequence[str],
    texts: Sequence[str],
    folders: Sequence[str],
) -> dict[str, Any]:
    """Option values from a YAML file: a mapping of option names, with - or _.

    Args:
        path: the file.
        module, name: a configuration class, whose fields are options.
        files: options that name a file, relative to the YAML file.
        lists: options that name several, or one.
        texts: options that are texts.
        folders: options that are a mapping of names to folders; they become texts "name=folder".

    Raises:
        ValueError: no mapping, an unknown option, or a value that its option cannot have.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping of options, got {type(found).__name__}")
    types = {field.name: str(field.type) for field in fields(_configuration(module, name))}
    types |= dict.fromkeys(files, "str") | dict.fromkeys([*lists, *texts], "str")
    values: dict[str, Any] = {}
    for key, value in found.items():
        option = str(key).replace("-", "_")
        if option in folders:
            if not isinstance(value, dict) or not all(fits(v, "str") for v in value.values()):
                raise ValueError(f"{path}: {key}: expected names with folders, got {value!r}")
            values[option] = [f"{name}={path.parent / place}" for name, place in value.items()]
            continue
        if option not in types:
            known = [*types, *folders]
            raise ValueError(f"{path}: expected options out of {known}, got {key!r}")
        value = numbered(value, types[option])
        several = isinstance(value, list) and option in lists
        if not all(fits(item, types[option]) for item in (value if several else [value])):
            raise ValueError(f"{path}: {key}: expected {types[option]}, got {value!r}")
        if option in lists:
            values[option] = [path.parent / item for item in (value if several else [value])]
        else:
            values[option] = path.parent / value if option in files else value
    return values


def expect_same(path: Path, settings: Mapping[str, Any], free: Container[str], what: str) -> None:
    """Refuse to go on in a folder with what other settings have left there.

    Args:
        path: the folder's JSON file of settings.
        settings: those asked for.
        free: names of those that may change.
        what: was done with them.

    Raises:
        ValueError: they differ; names in what.
    """
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    changed = changed_settings(before, settings, free)
    if changed:
        raise ValueError(
            f"out: expected a new folder or one of the same {what}, got {path.parent}, which "
            f"differs in {', '.join(changed)}; --fresh starts it over"
        )


def examples_of(options: argparse.Namespace, split: str) -> list[Any]:
    """The examples of one split, or "all"."""
    from zo_kernels import chat

    examples = chat.read_examples(options.data) if options.data else chat.builtin_examples()
    return examples if split == "all" else chat.select(examples, split=split)
