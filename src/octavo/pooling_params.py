"""How prompts are pooled, by vLLM's names: what programs give to `LLM.encode`, `embed`, `classify` and `score`."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.runtime.messages import PoolingTask


@dataclass
class PoolingParams:
    """Defaults are the model's own.

    dimensions: the first so many numbers of an embedding, of models that were trained for it. use_activation: whether
    embeddings get the length 1, and logits become probabilities. truncate_prompt_tokens: tokens of a longer prompt that
    are kept, -1 for what the model takes; None: a longer one is refused. prompt_name: which of the prompts in
    config_sentence_transformers.json stands before each text that is embedded.
    """

    truncate_prompt_tokens: int | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    task: PoolingTask | None = None
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        keep = self.truncate_prompt_tokens
        if keep is not None and keep != -1 and keep < 1:
            raise ValueError(f"truncate_prompt_tokens is {keep}; it must be 1 at least, or -1 for what the model takes")
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions is {self.dimensions}; it must be 1 at least")


def checked_params(params: object) -> PoolingParams:
    """The one value for all prompts; None: the model's own. Raises ValueError for anything else."""
    if params is None:
        return PoolingParams()
    if not isinstance(params, PoolingParams):
        raise ValueError(f"pooling_params is a {type(params).__name__}; one PoolingParams for all prompts works")
    return params
