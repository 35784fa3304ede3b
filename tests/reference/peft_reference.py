"""The same LLaMA with the same adapters in `peft` on torch: logits, loss, gradients."""

import numpy as np
import peft
import torch

from tests.reference import hf_reference

MODULES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def build(config, params, adapters):
    """Returns a `PeftModel` in float32 with our NumPy weights."""
    lora = config.lora
    model = peft.get_peft_model(
        hf_reference.build(config.model, params),
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,
            target_modules=[MODULES[name].split(".")[1] for name in lora.names],
            task_type="CAUSAL_LM",
        ),
    )
    state = {name: torch.from_numpy(x.copy()) for name, x in to_peft(config, adapters).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not any("lora_" in name for name in missing), unexpected
    return model


def to_peft(config, adapters):
    """Returns our tree of adapters, or of their gradients, under the names and shapes of `peft`."""
    out = {}
    for group in adapters["layers"].values():
        for name, adapter in group.items():
            for layer in range(config.model.n_layers):
                prefix = f"base_model.model.model.layers.{layer}.{MODULES[name]}"
                a, b = adapter["a"][layer], adapter["b"][layer]
                out[f"{prefix}.lora_A.default.weight"] = a.reshape(-1, config.lora.rank).T
                out[f"{prefix}.lora_B.default.weight"] = b.reshape(config.lora.rank, -1).T
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def logits_loss_gradients(config, params, adapters, batch):
    """Returns logits B T V, the weighted mean loss, and the adapters' gradients by peft's names."""
    model = build(config, params, adapters)
    logits, loss = hf_reference._loss(model, batch)
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in grads)
    return logits.detach().numpy(), loss.item(), grads
