"""The same LLaMA in `transformers` on torch: logits, gradients, and a run of AdamW.

Both use half-split RoPE, so weights need only a transposition.
"""

import math

import numpy as np
import torch
import transformers


def build(config, params):
    """Returns a `LlamaForCausalLM` in float32 with our NumPy weights."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="eager",
        )
    ).float()
    state = {name: torch.from_numpy(value.copy()) for name, value in to_hf(config, params).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    allowed = {"lm_head.weight"} if config.tied_embeddings else set()
    assert set(missing) <= allowed and not unexpected, (missing, unexpected)
    return model


def to_hf(config, params):
    """Returns our tree of weights, or gradients, under the names and shapes of `transformers`."""
    layers, dim = params["layers"], config.dim
    out = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["final_norm"]}
    if not config.tied_embeddings:
        out["lm_head.weight"] = params["lm_head"].T
    for i in range(config.n_layers):
        attn, mlp, prefix = layers["attn"], layers["mlp"], f"model.layers.{i}."
        out |= {
            prefix + "input_layernorm.weight": layers["attn_norm"][i],
            prefix + "post_attention_layernorm.weight": layers["mlp_norm"][i],
            prefix + "self_attn.q_proj.weight": attn["wq"][i].reshape(dim, -1).T,
            prefix + "self_attn.k_proj.weight": attn["wk"][i].reshape(dim, -1).T,
            prefix + "self_attn.v_proj.weight": attn["wv"][i].reshape(dim, -1).T,
            prefix + "self_attn.o_proj.weight": attn["wo"][i].reshape(-1, dim).T,
            prefix + "mlp.gate_proj.weight": mlp["w1"][i].T,
            prefix + "mlp.up_proj.weight": mlp["w3"][i].T,
            prefix + "mlp.down_proj.weight": mlp["w2"][i].T,
        }
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def _loss(model, batch):
    logits = model(input_ids=torch.from_numpy(batch["inputs"]).long()).logits
    entropy = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch["targets"]).long().flatten(), reduction="none"
    )
    weights = torch.from_numpy(batch["weights"]).flatten()
    return logits, (entropy * weights).sum() / weights.sum()


def greedy(model, prompts, ends=None):
    """Returns 64 new tokens for each prompt; after an end token, zeros."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return output[:, width:].tolist()


def logits_and_gradients(config, params, batch):
    """Returns logits B T V, and the gradients of the weighted mean loss by transformers' names."""
    model = build(config, params)
    logits, loss = _loss(model, batch)
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
    return logits.detach().numpy(), grads


def adamw_losses(config, params, batches):
    """Returns losses of torch's AdamW with clipping and the LLaMA schedule, on these batches."""
    model, optim, steps = build(config.model, params), config.optim, config.train.steps
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "norm" not in n], "weight_decay": optim.weight_decay},
        {"params": [p for n, p in named if "norm" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=optim.peak_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
    )

    def factor(step):
        if step < optim.warmup_steps:
            return (step + 1) / (optim.warmup_steps + 1)
        progress = (step - optim.warmup_steps) / (steps - optim.warmup_steps)
        low = optim.final_lr_fraction
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        _, loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return np.array(losses)
