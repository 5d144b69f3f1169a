"""octavo: quantize Hugging Face checkpoints to eight bits or four, prove what it cost, and serve them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from octavo.version import VERSION as __version__

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM as AsyncLLM
    from octavo.inputs import ExplicitEncoderDecoderPrompt as ExplicitEncoderDecoderPrompt
    from octavo.inputs import PromptType as PromptType
    from octavo.inputs import TextPrompt as TextPrompt
    from octavo.inputs import TokensPrompt as TokensPrompt
    from octavo.jobs.quantize import quantize as quantize
    from octavo.llm import LLM as LLM
    from octavo.lora_request import LoRARequest as LoRARequest
    from octavo.offline.arguments import AsyncEngineArgs as AsyncEngineArgs
    from octavo.offline.arguments import EngineArgs as EngineArgs
    from octavo.outputs import ClassificationOutput as ClassificationOutput
    from octavo.outputs import ClassificationRequestOutput as ClassificationRequestOutput
    from octavo.outputs import CompletionOutput as CompletionOutput
    from octavo.outputs import EmbeddingOutput as EmbeddingOutput
    from octavo.outputs import EmbeddingRequestOutput as EmbeddingRequestOutput
    from octavo.outputs import Logprob as Logprob
    from octavo.outputs import PoolingOutput as PoolingOutput
    from octavo.outputs import PoolingRequestOutput as PoolingRequestOutput
    from octavo.outputs import RequestOutput as RequestOutput
    from octavo.outputs import ScoringOutput as ScoringOutput
    from octavo.outputs import ScoringRequestOutput as ScoringRequestOutput
    from octavo.pooling_params import PoolingParams as PoolingParams
    from octavo.sampling_params import BeamSearchParams as BeamSearchParams
    from octavo.sampling_params import RequestOutputKind as RequestOutputKind
    from octavo.sampling_params import SamplingParams as SamplingParams
    from octavo.sampling_params import StructuredOutputsParams as StructuredOutputsParams

_PLACES = {
    "quantize": "octavo.jobs.quantize",
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.async_llm",
    "EngineArgs": "octavo.offline.arguments",
    "AsyncEngineArgs": "octavo.offline.arguments",
    "LoRARequest": "octavo.lora_request",
    "SamplingParams": "octavo.sampling_params",
    "BeamSearchParams": "octavo.sampling_params",
    "StructuredOutputsParams": "octavo.sampling_params",
    "RequestOutputKind": "octavo.sampling_params",
    "RequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
    "Logprob": "octavo.outputs",
    "PoolingParams": "octavo.pooling_params",
    "PoolingOutput": "octavo.outputs",
    "PoolingRequestOutput": "octavo.outputs",
    "EmbeddingOutput": "octavo.outputs",
    "EmbeddingRequestOutput": "octavo.outputs",
    "ClassificationOutput": "octavo.outputs",
    "ClassificationRequestOutput": "octavo.outputs",
    "ScoringOutput": "octavo.outputs",
    "ScoringRequestOutput": "octavo.outputs",
    "PromptType": "octavo.inputs",
    "ExplicitEncoderDecoderPrompt": "octavo.inputs",
    "TextPrompt": "octavo.inputs",
    "TokensPrompt": "octavo.inputs",
}

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """What programs use, imported when it is asked for: every process of a server imports this package first."""
    if name not in _PLACES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
