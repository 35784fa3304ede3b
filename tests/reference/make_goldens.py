"""Writes tests/goldens/*.npz: what `transformers` computes for the cases of test_transformers.py.

python -m tests.reference.make_goldens
"""

import numpy as np

from tests.helpers import ROOT, random_batch, random_params
from tests.model.test_transformers import CASES, STEPS
from tests.reference import hf_reference


def main():
    """Computes and writes one file per case."""
    for name, config in CASES.items():
        params = random_params(config.model)
        batches = [random_batch(config, step) for step in range(STEPS)]
        logits, grads = hf_reference.logits_and_gradients(config.model, params, batches[0])
        losses = hf_reference.adamw_losses(config, params, batches)
        path = ROOT / "tests" / "goldens" / f"{name}.npz"
        np.savez_compressed(path, logits=logits, losses=losses, **grads)
        print(
            f"{path.name}: {path.stat().st_size:,} bytes, losses {losses[0]:.4f}..{losses[-1]:.4f}"
        )


if __name__ == "__main__":
    main()
