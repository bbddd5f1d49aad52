"""A capped cache for transformers' own `generate`, without a session: python examples/generate_with_a_cap.py

The model is a tiny untrained one, so that nothing is downloaded; any model whose layers keep plain keys and values will do.
"""

import inspect

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import millpond


def main(length: int = 400) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    cache = millpond.PondCache(model, "64KiB", "keydiff")
    # From transformers 5.24 on the argument is called `cache`.
    name = "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"
    prompt = torch.arange(1, 20)[None]
    out = model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False, **{name: cache})
    print(f"{out.shape[1]} tokens went by, {cache.length} are stored")
    print(f"{cache.ledger.peak} of {cache.plan.budget} bytes at most")


if __name__ == "__main__":
    main()
