"""How many normals a step draws, and how many bytes its passes over the weights move."""

from __future__ import annotations

from torch import nn

from zo_kernels.pipeline.shapes import ModelShape


def traffic(
    shape: ModelShape, mode: str, chosen: dict[str, nn.Parameter], tokens: int, *, queries: int
) -> tuple[int, int]:
    """Normals drawn and bytes moved in one step, beside the forwards' own reads.

    With e bytes per weight, n selected weights, m of them perturbed in an evaluation (of an
    embedding that is not the head as well: rows looked up, at most one per token) and q queries:

        streamed   q 2 m + q n normals     q 4 e m + 2 e n bytes
        dual       q m + q n               q 3 e m + 2 e n
        master8    as streamed             and 2 n for the residuals, if e = 2
        inplace    3 n; 4 q n if q > 1     6 e n; (6 q + 2) e n if q > 1
        snapshot   3 n; 3 q n if q > 1     8 e n; (8 q + 2) e n if q > 1
        master     3 n; 3 q n if q > 1     (3 e + 20) n; (q (12 + 3 e) + 12 + e) n if q > 1
        mezo       4 q n                   (6 q + 2) e n
        align-sgd, align-adamw, dpo        12 n, 28 n (float32); 6 n more for 16-bit weights
        align-noise                        2 m normals and 4 e m bytes more, m of the linears

    Args:
        shape: the model.
        mode: as in ``plan``.
        chosen: selected parameters; for "align-noise" those under noise.
        tokens: of a batch.
        queries: directions per step.
    """
    q = queries
    e = next(iter(chosen.values())).element_size()
    if mode.startswith("align") or mode == "dpo":
        n = shape.elements
        moved = (12 if mode == "align-sgd" else 28) * n + (6 * n if e == 2 else 0)
        noisy = sum(p.numel() for p in chosen.values()) if mode == "align-noise" else 0
        return 2 * noisy, moved + 4 * e * noisy
    n = sum(parameter.numel() for parameter in chosen.values())
    m = n - _not_looked_up(shape, chosen, tokens)
    joined = q == 1  # the way back from the second point is the update
    residuals = 2 * n if mode == "master8" and e == 2 else 0
    return {
        "streamed": (q * (2 * m + n), q * 4 * e * m + 2 * e * n),
        "master8": (q * (2 * m + n), q * 4 * e * m + 2 * e * n + residuals),
        "dual": (q * (m + n), q * 3 * e * m + 2 * e * n),
        "inplace": (3 * n if joined else 4 * q * n, (6 if joined else 6 * q + 2) * e * n),
        "snapshot": (3 * q * n, (8 if joined else 8 * q + 2) * e * n),
        "master": (
            3 * q * n,
            (3 * e + 20 if joined else q * (12 + 3 * e) + 12 + e) * n,
        ),
        "mezo": (4 * q * n, (6 * q + 2) * e * n),
    }[mode]


def _not_looked_up(shape: ModelShape, chosen: dict[str, nn.Parameter], tokens: int) -> int:
    """Selected weights of embeddings that an evaluation does not read."""
    ids = {id(parameter) for parameter in chosen.values()}
    head = shape.model.get_output_embeddings().weight
    return sum(
        max(0, module.num_embeddings - tokens) * module.embedding_dim
        for module in shape.model.modules()
        if isinstance(module, nn.Embedding) and id(module.weight) in ids - {id(head)}
    )
