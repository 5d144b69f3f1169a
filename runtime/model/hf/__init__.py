"""--model-impl hf: transformers' own modelling code over the paged KV cache."""
