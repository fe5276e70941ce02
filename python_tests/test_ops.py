"""The public operations refuse bad arguments before writing anything, and behave under torch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same_bits

import zo_kernels as zk
from zo_kernels.backends import native
from zo_kernels.ops import combine, dispatch

ROOT = Path(__file__).parents[1]
ADDRESS = {"seed": 1, "directions": [2], "streams": [3]}


def good(count: int = 12) -> torch.Tensor:
    return torch.linspace(-1, 1, count)


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


# What is wrong; dst (src is the same unless given); changed arguments; error; part of the message.
BAD_TENSORS = [
    ("not a list", good(), {}, TypeError, "dst: expected a list of tensors, got Tensor"),
    ("not tensors", [good(), 1.0], {}, TypeError, "dst[1]: expected a tensor, got float"),
    (
        "int",
        [good().int()],
        {},
        TypeError,
        "dst[0]: expected float32, bfloat16 or float16, got torch.int32",
    ),
    (
        "float64",
        [good(), good().double()],
        {"streams": [3, 4]},
        TypeError,
        "dst[1]: expected float32, bfloat16 or float16, got torch.float64",
    ),
    (
        "meta",
        [good().to("meta")],
        {},
        ValueError,
        "dst[0]: expected a tensor with data, got one on the meta device",
    ),
    ("sparse", [sparse()], {}, TypeError, "dst[0]: expected a strided tensor, got layout"),
    (
        "not contiguous",
        [good().view(3, 4).t()],
        {},
        ValueError,
        "dst[0]: expected a contiguous tensor (elements are addressed in row-major order), "
        "got shape (4, 3) with strides (1, 4)",
    ),
    ("stepped", [good()[::2]], {}, ValueError, "dst[0]: expected a contiguous tensor"),
]
BAD_OPTIONS = [
    ({"seed": -1}, ValueError, "seed: expected 0 <= seed < 2^64, got -1"),
    ({"seed": 2**64}, ValueError, "seed: expected 0 <= seed < 2^64, got 18446744073709551616"),
    ({"seed": 1.0}, TypeError, "seed: expected an int, got float (1.0)"),
    ({"seed": True}, TypeError, "seed: expected an int, got bool (True)"),
    ({"directions": [-1]}, ValueError, "directions[0]: expected 0 <= directions[0] < 2^32, got -1"),
    ({"directions": [2**32]}, ValueError, "directions[0]: expected 0 <= directions[0] < 2^32"),
    ({"directions": []}, ValueError, "directions: expected at least one, got an empty list"),
    ({"directions": 2}, TypeError, "directions: expected a list of ints, got int"),
    ({"streams": [2**32]}, ValueError, "streams[0]: expected 0 <= streams[0] < 2^32"),
    ({"streams": [-1]}, ValueError, "streams[0]: expected 0 <= streams[0] < 2^32, got -1"),
    ({"streams": [1, 2]}, ValueError, "streams: expected 1 (one per tensor of dst), got 2"),
    ({"offsets": [-1]}, ValueError, "offsets[0]: expected 0 <= offset <= 2^62 - 12, got -1"),
    ({"offsets": [2**62 - 11]}, ValueError, "offsets[0]: expected 0 <= offset <= 2^62 - 12"),
    ({"offsets": []}, ValueError, "offsets: expected 1 (one per tensor of dst), got 0"),
    ({"offsets": [0.5]}, TypeError, "offsets[0]: expected an int, got float (0.5)"),
    ({"offsets": 4}, TypeError, "offsets: expected None or a list of ints, got int"),
    ({"scales": [math.nan]}, ValueError, "scales[0]: expected a finite float32 value, got nan"),
    ({"scales": [math.inf]}, ValueError, "scales[0]: expected a finite float32 value, got inf"),
    ({"scales": [1e39]}, ValueError, "scales[0]: expected a finite float32 value, got 1e+39"),
    ({"scales": [[-math.nan]]}, ValueError, "scales[0][0]: expected a finite float32 value"),
    ({"scales": ["1"]}, TypeError, "scales[0]: expected a float, got str ('1')"),
    ({"scales": 1.0}, TypeError, "scales: expected a list of floats, got float"),
    ({"scales": [1.0, 2.0]}, ValueError, "scales: expected 1 (one per direction), got 2"),
    ({"scales": [[1.0], [1.0]]}, ValueError, "scales: expected 1 (one per tensor of dst), got 2"),
    ({"src_scale": math.nan}, ValueError, "src_scale: expected a finite float32 value, got nan"),
    ({"rounding": "up"}, ValueError, "rounding: expected 'nearest' or 'stochastic', got 'up'"),
    (
        {"backend": "cuda"},
        ValueError,
        "backend: expected None or one of ('reference', 'native', 'triton'), got 'cuda'",
    ),
]


def refused(error: type, message: str, dst: object, src: object, **changes: object) -> None:
    """combine_ raises this error with this text, and no tensor it was given has changed."""
    tensors = [
        t
        for t in [*(dst if isinstance(dst, list) else [dst]), *(src if src is not dst else [])]
        if isinstance(t, torch.Tensor) and t.device.type != "meta"
    ]
    before = [t.clone() for t in tensors]
    arguments = {"scales": [0.5], **ADDRESS, **changes}
    with pytest.raises(error) as caught:
        zk.combine_(dst, src, **arguments)
    assert message in str(caught.value)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor.to_dense(), old.to_dense())


@pytest.mark.parametrize(
    "dst, changes, error, message", [c[1:] for c in BAD_TENSORS], ids=[c[0] for c in BAD_TENSORS]
)
def test_bad_tensors_are_named(dst, changes, error, message):
    """As dst, and the same in src's place (where it is named src)."""
    refused(error, message, dst, dst, **changes)
    if isinstance(dst, list) and all(isinstance(t, torch.Tensor) for t in dst):
        fine = [torch.zeros(t.shape) for t in dst]
        refused(error, message.replace("dst[", "src["), fine, dst, **changes)


@pytest.mark.parametrize(
    "changes, error, message", BAD_OPTIONS, ids=[c[2][:44] for c in BAD_OPTIONS]
)
def test_bad_options_are_named(changes, error, message):
    """Every option out of range or of a wrong type or length."""
    weight = good()
    refused(error, message, [weight], [weight], **changes)


def test_pairs_must_match_and_overlaps_are_refused():
    """Shapes, lengths, and memory that a written tensor shares with any other."""
    base = good(40)
    refused(ValueError, "src: expected 1 (one per tensor of dst), got 2", [base], [base, base])
    refused(
        ValueError, "src[0]: expected shape (40,) as dst, got (39,)", [base], [base[1:].clone()]
    )
    apart = "expected memory apart from all written tensors, got one that overlaps"
    refused(ValueError, f"src[0]: {apart} dst[0]", [base[:20]], [base[10:30]])
    refused(ValueError, f"dst[0]: {apart} src[0]", [base[10:30]], [base[:20]])
    two = {"streams": [1, 2]}
    refused(ValueError, f"dst[1]: {apart} dst[0]", [base[:20], base[19:39]], [good(20)] * 2, **two)
    same = [base[:20], base[:20]]
    refused(ValueError, apart, same, same, **two)
    # Nothing is written where a pair in place comes before the overlap.
    beside = good(20)
    refused(
        ValueError, f"dst[1]: {apart} src[1]", [beside, base[10:30]], [beside, base[:20]], **two
    )
    refused(ValueError, f"src[1]: {apart} dst[0]", [beside, base[:20]], [beside, beside], **two)
    # The same memory as two dtypes is an overlap too.
    refused(ValueError, apart, [base], [base.view(torch.bfloat16)[:40]])


def test_what_touches_without_overlap_is_accepted():
    """Neighbours, one source for two results, an equal view as src, and empty tensors."""
    base, expected = good(40), good(40)
    zk.perturb_([base[:20], base[20:]], 0.1, seed=1, direction=2, streams=[3, 3], offsets=[0, 20])
    zk.perturb_([expected], 0.1, seed=1, direction=2, streams=[3])
    assert_same_bits(base, expected)
    source, first, second = good(), torch.empty(12), torch.empty(12)
    zk.combine_([first, second], [source, source], [0.1], seed=1, directions=[2], streams=[3, 3])
    assert_same_bits(first, second)
    alias = source[:]
    zk.combine_([alias], [source], [0.1], **ADDRESS)
    assert_same_bits(source, first)
    zk.combine_([], [], [0.1], seed=1, directions=[2], streams=[])
    zk.perturb_([torch.empty(0), torch.empty(3, 0)], 0.1, seed=1, direction=2, streams=[3, 4])
    scalar = torch.tensor(0.5)
    zk.perturb_([scalar], 1.0, seed=1, direction=2, streams=[3])
    assert scalar == torch.tensor(0.5) + zk.normal(1, seed=1, direction=2, stream=3)[0]


def test_perturb_scales():
    """One scale for all or one per tensor; the errors name `scale`."""
    a, b = good(), good()
    zk.perturb_([a, b], [0.25, 0.5], seed=1, direction=2, streams=[3, 3])
    z = zk.normal(12, seed=1, direction=2, stream=3)
    torch.testing.assert_close(b - a, 0.25 * z, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"scale\[0\]: expected a finite"):
        zk.perturb_([a], [math.nan], seed=1, direction=2, streams=[3])
    with pytest.raises(TypeError, match="scale: expected a float or a list of floats, got str"):
        zk.perturb_([a], "0.1", seed=1, direction=2, streams=[3])


@pytest.mark.parametrize("function", [zk.normal, zk.random_words])
def test_emitters_check_their_address(function):
    """Count and offset; zero elements are an empty tensor of the right dtype."""
    dtype = torch.float32 if function is zk.normal else torch.int64
    assert function(0, seed=0, direction=0, stream=0).dtype == dtype
    address = {"seed": 0, "direction": 0, "stream": 0}
    for changes, message in [
        ({"count": -1}, "count: expected 0 <= count < 2^62, got -1"),
        ({"offset": -1}, "offset: expected 0 <= offset <= 2^62 - 4, got -1"),
        ({"direction": 2**32}, "direction: expected 0 <= direction < 2^32"),
        ({"stream": -5}, "stream: expected 0 <= stream < 2^32, got -5"),
        ({"seed": 2**64}, "seed: expected 0 <= seed < 2^64"),
    ]:
        with pytest.raises(ValueError) as caught:
            function(**{"count": 4, **address, **changes})
        assert message in str(caught.value)


def test_a_named_backend_never_falls_back(monkeypatch):
    """Unavailable ones say why and write nothing; an unknown instruction set lists the known."""
    weight = good()
    monkeypatch.setattr(native, "_reason", "the extension is not here")
    message = "backend 'native': the extension is not here"
    refused(RuntimeError, message, [weight], [weight], backend="native")
    refused(RuntimeError, "ZO_KERNELS_STRICT=1 and the extension", [weight], [weight])
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(dispatch, "_triton_reason", lambda: "no GPU is visible")
    message = "backend 'triton': no GPU is visible"
    refused(RuntimeError, message, [weight], [weight], backend="triton")
    monkeypatch.setenv("ZO_KERNELS_ISA", "mmx")
    message = "ZO_KERNELS_ISA: expected one of "
    refused(RuntimeError, message, [weight], [weight], backend="native")


def test_opcheck():
    """Schemas, mutation annotations, fake tensors and autograd registration of both ops."""
    rest = ([0.5, 0.25], [2], None, None, 1, [3, 4], [0, 5], 1.0, True, "normal", None, "native")
    tensors = [good(), good(7).bfloat16()]
    torch.library.opcheck(combine._perturb_op, (tensors, *rest))
    torch.library.opcheck(combine._combine_op, ([t.float() + 1 for t in tensors], tensors, *rest))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile_gives_the_same_bits(compiler):
    """torch.compile traces perturb_ and combine_ without a graph break."""

    def step(weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        zk.perturb_([weight], 1e-2, seed=2**63 + 5, direction=2, streams=[3], offsets=[1])
        zk.combine_([out], [weight], [0.1, 0.2], seed=1, directions=[0, 1], streams=[3])
        return weight * 2 + out

    expected_weight, expected_out = good(), torch.empty(12, dtype=torch.bfloat16)
    expected = step(expected_weight, expected_out)
    torch._dynamo.reset()
    weight, out = good(), torch.empty(12, dtype=torch.bfloat16)
    actual = torch.compile(step, fullgraph=True, backend=compiler)(weight, out)
    assert_same_bits(actual, expected)
    assert_same_bits(weight, expected_weight)
    assert_same_bits(out, expected_out)


def test_versions_and_autograd():
    """Writing bumps the version counter of dst only; a parameter may be written in place."""
    weight, source = torch.nn.Parameter(good()), good()
    versions = weight._version, source._version
    zk.combine_([weight], [source], [0.1], **ADDRESS)
    zk.perturb_([weight], 0.1, seed=1, direction=2, streams=[3])
    assert weight._version >= versions[0] + 2 and source._version == versions[1]
    loss = (weight * weight).sum()
    zk.perturb_([weight], 0.1, seed=1, direction=2, streams=[3])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def in_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter that has the package on its path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ZO_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_importing_the_package_is_light():
    """`import zo_kernels` loads neither triton nor transformers."""
    done = in_python(
        "import sys, zo_kernels\nprint([m for m in ('triton', 'transformers') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


WITHOUT_EXTENSION = (
    "import sys, warnings; sys.modules['zo_kernels._C'] = None\n"
    "import torch, zo_kernels as zk\n"
    "w = torch.zeros(4)\n"
    "with warnings.catch_warnings(record=True) as caught:\n"
    "    warnings.simplefilter('always')\n"
    "    for _ in range(3): zk.perturb_([w], 1.0, seed=1, direction=2, streams=[3])\n"
    "print(len(caught), caught[0].message, w.tolist())\n"
)


def test_a_missing_extension_is_one_warning_or_an_error():
    """Without zo_kernels._C: one warning and the reference's bits; with STRICT an error."""
    done = in_python(WITHOUT_EXTENSION)
    expected = torch.zeros(4)
    for _ in range(3):
        zk.perturb_([expected], 1.0, seed=1, direction=2, streams=[3])
    assert done.stdout.startswith("1 zo_kernels uses its slow reference backend: the C++ extension")
    assert done.stdout.strip().endswith(str(expected.tolist())), done.stdout + done.stderr
    strict = in_python(WITHOUT_EXTENSION, ZO_KERNELS_STRICT="1")
    assert strict.returncode != 0
    assert "RuntimeError: ZO_KERNELS_STRICT=1 and the C++ extension zo_kernels._C" in strict.stderr
