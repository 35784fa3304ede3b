"""Writes what `peft` and `bitsandbytes` compute for test_lora.py and test_nf4.py.

python -m tests.reference.make_lora_goldens  (with `pip install bitsandbytes '.[parity]'`)
"""

from unittest import mock

import numpy as np

from tests.helpers import ROOT, random_adapters, random_batch, random_params


def lora():
    """Yields logits, loss and gradients of each case."""
    from tests.model.test_lora import PEFT_CASES
    from tests.reference import peft_reference

    for name, config in PEFT_CASES.items():
        logits, loss, grads = peft_reference.logits_loss_gradients(
            config, random_params(config.model), random_adapters(config), random_batch(config, 0)
        )
        yield f"lora_{name}", {"logits": logits, "loss": loss, **grads}


def nf4():
    """Yields codes, scales and the matrix that they stand for.

    It hides bitsandbytes' compiled library, so that the definition in torch is used: the CPU kernel
    sometimes takes the second nearest scale.
    """
    import torch

    with mock.patch("ctypes.cdll.LoadLibrary", side_effect=OSError("not wanted")):
        from bitsandbytes import functional

    from tests.model.test_nf4 import MATRICES, matrix

    for name in MATRICES:
        weight = torch.from_numpy(matrix(name))  # (out, in), as torch has it
        codes, state = functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True, blocksize=64
        )
        yield (
            f"nf4_{name}",
            {
                "codes": codes.numpy().reshape(-1),
                "scales": state.absmax.numpy(),
                "groups": state.state2.absmax.numpy(),
                "offset": state.offset.numpy(),
                "table": functional.create_dynamic_map().numpy(),
                "matrix": functional.dequantize_4bit(codes, state).numpy(),
            },
        )


def saved_by_peft(folder):
    """Writes the adapters of one case as peft saves them."""
    from tests.model.test_lora import PEFT_CASES
    from tests.reference import peft_reference

    config = PEFT_CASES["some"]
    model = peft_reference.build(config, random_params(config.model), random_adapters(config))
    model.peft_config["default"].base_model_name_or_path = "a/base"
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def main():
    """Computes and writes one file per case."""
    # NF4 goes first: peft would import bitsandbytes with its compiled library.
    for cases in (nf4, lora):
        for name, arrays in cases():
            path = ROOT / "tests" / "goldens" / f"{name}.npz"
            np.savez_compressed(path, **arrays)
            print(f"{path.name}: {path.stat().st_size:,} bytes")
    saved_by_peft(ROOT / "tests" / "goldens" / "peft")


if __name__ == "__main__":
    main()
