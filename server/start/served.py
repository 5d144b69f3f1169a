"""The model as the server sees it, and its metrics, once the engines have said what they have loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from octavo.runtime.config import EngineConfig
from octavo.runtime.messages import Ready
from octavo.runtime.source_messages import AudioSource, TextSource
from octavo.runtime.vision.recipes import VisionModel
from octavo.server.draft_metrics import DraftReports
from octavo.server.encoder_text import read_encoder_text
from octavo.server.fleet.adapters import AdapterNames
from octavo.server.fleet.fleet import Fleet
from octavo.server.media.images import Images
from octavo.server.message.model_formats import ModelFormats
from octavo.server.metrics import Metrics
from octavo.server.pooled_text import read_pooled_text
from octavo.server.served_model import ServedModel
from octavo.server.speech_text import read_speech_text
from octavo.server.start.flags import ServeOptions, model_of
from octavo.server.start.text_side import TextSide

if TYPE_CHECKING:
    from octavo.server.processes.places import Places


def served_model(
    options: ServeOptions,
    text: TextSide,
    ready: Ready,
    formats: ModelFormats,
    names: tuple[str, str] = ("", ""),
    adapters: AdapterNames | None = None,
) -> ServedModel:
    """The model as the server sees it. names: ServedModel's server_name and response_ending."""
    most_logprobs = options.text.max_logprobs
    source = ready.source
    return ServedModel(
        names=text.names,
        root=model_of(options.model),
        tokenizer=text.tokenizer,
        renderer=text.renderer,
        end_ids=text.end_ids,
        defaults=text.defaults,
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        max_num_seqs=options.engine.max_num_seqs * options.engine.parallel.data_parallel_size,
        scheduling_policy=options.engine.scheduling_policy,
        max_logprobs=ready.vocab_size if most_logprobs < 0 else most_logprobs,
        clamps_max_tokens=options.text.max_tokens_policy == "clamp",
        trust_request_chat_template=options.text.trust_request_chat_template,
        structured_outputs=options.text.structured_outputs_config,
        formats=formats,
        aliases=options.model.model_aliases,
        serves_any=text.serves_any_name,
        report=ready.report,
        directory=text.directory,
        stream_interval=options.text.stream_interval,
        tokens_as_token_ids=options.text.return_tokens_as_token_ids,
        template_variables=options.text.default_chat_template_kwargs,
        tool_strict_level=options.text.tool_strict_level,
        reasoning_end_str=options.text.reasoning_config.reasoning_end_str,
        draft_reports=_draft_reports(options),
        server_name=names[0],
        response_ending=names[1],
        adapters=adapters,
        pooled=None if ready.pooled is None else read_pooled_text(text.directory, ready.pooled),
        images=None if ready.vision is None else _images(options, text, ready.vision),
        speech=read_speech_text(text.directory, source, text.tokenizer) if isinstance(source, AudioSource) else None,
        encoder=read_encoder_text(text.directory, source, ready.vocab_size) if isinstance(source, TextSource) else None,
    )


def _images(options: ServeOptions, text: TextSide, vision: VisionModel) -> Images:
    directory = options.text.allowed_local_media_path
    mark, placeholder = (text.tokenizer.token_name(token) for token in (vision.mark_id, vision.placeholder_id))
    return Images(vision, mark, placeholder, None if directory is None else Path(directory))


def _draft_reports(options: ServeOptions) -> DraftReports:
    speculative = options.engine.speculative_config
    most = 0 if speculative is None else speculative.num_speculative_tokens
    return DraftReports(options.text.per_request_spec_decode_metrics, most)


def made_metrics(
    options: ServeOptions, name: str, client: Fleet, ready: Ready, places: Places | None = None
) -> Metrics:
    """The metrics of one process. places: where several keep what they count."""
    facts = [_cache_facts(options.engine, one) for one in client.readies]
    return Metrics(name, ready, facts, None if places is None else places.metrics)


def _cache_facts(config: EngineConfig, ready: Ready) -> dict[str, str]:
    """The labels of vllm:cache_config_info."""
    return {
        "block_size": str(ready.block_size),
        "num_gpu_blocks": str(ready.num_blocks),
        "kv_cache_size_tokens": str(ready.num_blocks * ready.block_size),
        "kv_cache_max_concurrency": f"{ready.num_blocks * ready.block_size / ready.max_model_len:.4g}",
        "cache_dtype": ready.report.kv_cache_dtype,
        "enable_prefix_caching": str(config.enable_prefix_caching),
    }
