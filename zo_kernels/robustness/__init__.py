"""How a model behaves when its weights are disturbed: perturbations, metrics, suite and report."""
