"""A model's engines without a server: what `octavo.LLM` and `octavo.AsyncLLM` are made of."""
