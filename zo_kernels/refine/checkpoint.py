"""Loading and saving Hugging Face directories, and a fingerprint of a model's weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zo_kernels import replay
from zo_kernels.checks import expect_device
from zo_kernels.files import naming, replace_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of fast forwards: bfloat16 on GPUs and CPUs that multiply it, else float32.

    A CPU without AVX512-BF16 or AMX runs bfloat16 matrix products several times slower than
    float32 (6.5x on a Zen 3).
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    capable = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    has_instructions = "avx512_bf16" in _cpu_flags() or "bf16" in _cpu_flags()
    return torch.bfloat16 if capable and has_instructions else torch.float32


def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    for line in path.read_text().splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.split(":", 1)[1].split())
    return set()


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer, from a local directory.

    Args:
        directory: a Hugging Face directory (config.json, safetensors, tokenizer).
        dtype: "auto" (``fast_dtype``), "float32", "bfloat16", "float16" or a torch dtype.
        device: where the model goes.

    Raises:
        FileNotFoundError: the directory has no config.json.
        ValueError: an unknown dtype, a device that is not there, or a tokenizer without an end
            token.
    """
    from transformers import AutoModelForCausalLM

    path, device = expect(directory), expect_device("device", device)
    if dtype == "auto":
        dtype = fast_dtype(device)
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected auto or one of {sorted(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    tokenizer = load_tokenizer(path)
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.to(device).eval(), tokenizer


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a Hugging Face directory.

    Raises:
        ValueError: it has no end token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer of {directory}: expected an end-of-text token, got none")
    return tokenizer


def skeleton(config: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """The model that a Hugging Face directory, or its config.json, describes, on the meta device.

    Args:
        config: the directory or the file.
        dtype: of the parameters.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: no causal language model that transformers knows without code of the model's
            own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(config)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".json":
        raise FileNotFoundError(
            f"model: expected a Hugging Face directory with config.json, or a config.json: {path}"
        )
    try:
        read = AutoConfig.from_pretrained(file)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read, dtype=dtype).eval()
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{file}: expected the config of a causal language model, got: {error}"
        ) from error


def expect(directory: str | os.PathLike[str]) -> Path:
    """The path of a Hugging Face directory.

    Raises:
        FileNotFoundError: it has no config.json.
    """
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model: expected a Hugging Face directory with config.json: {path}"
        )
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars over the weights, which flicker by in half a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save(model: Any, tokenizer: Any, directory: str | os.PathLike[str]) -> Path:
    """Write a directory that ``from_pretrained`` loads; it appears complete or not at all.

    Raises:
        FileExistsError: the directory exists and is not an earlier checkpoint.
        OSError: it cannot be written; what was there is as it was.
    """
    from safetensors import SafetensorError

    with _quiet(), replace_folder(directory) as work, naming(directory):
        try:
            model.save_pretrained(work)
        except SafetensorError as error:  # how a full disk comes up
            raise OSError(f"{directory}: expected room for the model's weights: {error}") from error
        tokenizer.save_pretrained(work)
    return Path(directory)


def remove(directory: str | os.PathLike[str]) -> None:
    """Delete a checkpoint that ``save`` wrote, if it is there; it is gone at once or whole.

    What a killed call left of one goes too.
    """
    gone = Path(directory).with_name(f".gone-{Path(directory).name}")
    if gone.exists():
        shutil.rmtree(gone)
    if Path(directory).exists():
        os.replace(directory, gone)
        shutil.rmtree(gone)


def file_digest(directory: Path) -> str:
    """A name for a directory's weights: 16 hexadecimal digits of the files' BLAKE2b.

    Raises:
        FileNotFoundError: it has no weights as safetensors.
    """
    digest = hashlib.blake2b(digest_size=8)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model: expected weights as safetensors in {directory}, got none")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """``replay.fingerprint`` of all parameters and persistent buffers."""
    return replay.fingerprint(model.state_dict().items())
