"""Evaluation records of known numbers."""

from __future__ import annotations

from zo_kernels.robustness.conditions import default_conditions

PROMPTS = {"harmful": ["Do harm", "Do <b>worse</b>", "Lie"], "harmless": ["Be kind", "Sing"]}


def made_up(label: str, shift: float, **changes) -> list[dict]:
    """Records with known numbers: draws 0, 1, 2 have refusal losses base + 0, 0.1, 0.2."""
    records = []
    for condition in default_conditions(noise=(0.05, 0.1), activation_noise=(0.02,)):
        loss = 1.0 + 10 * condition.level * (condition.kind == "weight_noise") + shift
        loss += 0.1 * (condition.draw or 0) * (1.0 + shift)
        refused = [1, int(shift >= 0), 0]
        records.append(
            {
                "label": label,
                "condition": condition.name,
                "family": condition.family,
                "state": condition.state,
                "kind": condition.kind,
                "level": condition.level,
                "draw": condition.draw,
                "block": None,
                "block_number": None,
                "noise_seed": 0,
                "noise_kind": "rel_std",
                "noise_on": "linear",
                "refusal_list": "prefix-1",
                "detector": "degenerate-1",
                "prompts": "0123456789abcdef",
                "text": "fedcba9876543210",
                "refusal": "No",
                "max_length": 512,
                "max_new_tokens": 4,
                "perplexity_window": 16,
                "perplexity_tokens": 32,
                "harmful_count": 3,
                "harmless_count": 2,
                "refusal_loss": loss,
                "refusal_losses": [loss - 0.1, loss, loss + 0.1],
                "harmless_loss": 2.0,
                "harmless_losses": [2.0, None],
                "refusal_rate": sum(refused) / 3,
                "refused": refused,
                "over_refusal_rate": 0.5,
                "over_refused": [1, 0],
                "compliance_rate": 1 / 3,
                "complied": [0, 1 - refused[1], 0],
                "degenerate_rate": 0.2,
                "broken": [0, 0, 1, 0, 0],
                "degenerate": [None, None, "empty"],
                "harmless_degenerate": [None, None],
                "harmful_answers": [f"No, {label}", "<script>alert(1)</script>", ""],
                "harmless_answers": ["No", "La"],
                "harmful_prompts": PROMPTS["harmful"],
                "harmless_prompts": PROMPTS["harmless"],
                "perplexity": 20.0 + 4 * (condition.draw or 0),
                "utility_losses": [3.0, 3.2],
                "divergence": 0.1,
                "divergences": [0.1, 0.1],
                "non_finite": [],
            }
            | changes
        )
    return records


def in_blocks(label: str, rises: list[float]) -> list[dict]:
    """Records of one block disturbed at a time: the clean losses and so much more."""
    clean = made_up(label, 0.0)[0]
    return [
        clean
        | {
            "condition": f"w0.1@{i}/0",
            "family": f"w0.1@{i}",
            "state": "w0.1",
            "kind": "weight_noise",
            "level": 0.1,
            "draw": 0,
            "block": f"model.layers.{i}",
            "block_number": i,
            "refusal_losses": [loss + rise for loss in clean["refusal_losses"][:2]],
        }
        for i, rise in enumerate(rises)
    ]
