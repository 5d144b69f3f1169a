"""`octavo.LLM`: a model in a program of one's own, without a server. Names and arguments are vLLM's.

    llm = LLM("MODEL", max_model_len=2048)
    for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0)):
        print(output.outputs[0].text)

It starts the engine process that `octavo serve` starts, and asks it by the server's own code, on an event loop in a
thread. The engine ends with `close`, with the block of `with LLM(...)`, or with the program, however that ends.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from octavo.collector import seldom
from octavo.inputs import Given, prompts_of
from octavo.lora_request import Adapters, LoRARequest, checked_adapters
from octavo.offline.arguments import EngineArgs
from octavo.offline.errors import EngineError, python_errors
from octavo.offline.loop_thread import LoopThread
from octavo.offline.refusals import checked_others, checked_reset, missing
from octavo.offline.start import start
from octavo.outputs import (
    BeamSearchOutput,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Metric,
    Output,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from octavo.pooling_params import PoolingParams, checked_params
from octavo.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from octavo.offline.model import OfflineModel
    from octavo.offline.requests import Asked, Conversation, Job
    from octavo.runtime.messages import PoolingTask
    from octavo.server.pooled_inputs import PooledPrompt
    from octavo.server.pooled_text import PooledText
    from octavo.server.pooling import PooledResult

CHAT_OPTIONS = ("chat_template", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
Message = Mapping[str, Any]
Progress = Callable[..., Any]


class LLM:
    """A model that is loaded, until it is closed.

    model: a local directory, or a Hugging Face Hub id. options: those of `octavo serve`, with underscores, by vLLM's
    names: max_model_len, dtype, quantization, tensor_parallel_size, seed, max_num_seqs and so on. What vLLM has beside
    them is taken where it changes nothing. Raises TypeError and ValueError for what octavo does not have, and
    EngineError with the engine's own message where it can't start.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._model = start(model, options)
        self._numbers = itertools.count()
        self._queued: list[Job] = []
        self._thread = LoopThread("octavo-llm")
        self._close = weakref.finalize(self, _end, self._model, self._thread, os.getpid())
        try:
            self._thread.call(self._model.open())
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> LLM:
        """The same, with arguments that are a value."""
        return cls(engine_args.model, **engine_args.options)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Progress = True,
        lora_request: Adapters = None,
        priority: int | Sequence[int] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """The answers to one prompt or many, in their order.

        prompts: text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}, or a list of these. A model that sees
        takes "multi_modal_data": {"image": PIL.Image.Image or several} beside either. sampling_params: for all, or one
        for each; None: get_default_sampling_params(). use_tqdm: a bar at stderr; or what makes one, as tqdm does.
        lora_request: an adapter for all, or one or None for each, with enable_lora=True. priority: lower ones go first,
        with scheduling_policy="priority". Ctrl-C ends what runs, and the model stays. Raises ValueError, in which
        nothing is answered, and EngineError.
        """
        checked_others("generate", others)
        return self._run(self._jobs(prompts_of(prompts), sampling_params, lora_request, priority), use_tqdm)

    def enqueue(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: Adapters = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: bool | Progress = True,  # noqa: ARG002  # vLLM's; nothing is waited for here
        **others: Any,
    ) -> list[str]:
        """Keep prompts for `wait_for_completion`; returns their request ids. Arguments are those of `generate`."""
        checked_others("enqueue", others)
        return self._keep(self._jobs(prompts_of(prompts), sampling_params, lora_request, priority))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Progress = True,
        lora_request: Adapters = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """The answers to one conversation or many: their messages through the chat template, then as `generate`.

        Parts of messages may be images: image_url (data:, or a file below allowed_local_media_path), and image_pil.

        chat_template: instead of the model's; chat_template_kwargs: its variables. tools: shown to the model; its calls
        are in the answer's text, as it writes them, and with a tool_call_parser in tool_calls.
        """
        checked_others("chat", others)
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        conversations = self._conversations(messages, options, tools)
        return self._run(self._jobs(conversations, sampling_params, lora_request, priority), use_tqdm)

    def enqueue_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Progress = True,  # noqa: ARG002  # vLLM's; nothing is waited for here
        lora_request: Adapters = None,
        priority: int | Sequence[int] | None = None,
        tools: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> list[str]:
        """Keep conversations for `wait_for_completion`; returns their request ids. Arguments are those of `chat`."""
        own = {name: options.pop(name) for name in CHAT_OPTIONS if name in options}
        checked_others("enqueue_chat", options)
        conversations = self._conversations(messages, own, tools)
        return self._keep(self._jobs(conversations, sampling_params, lora_request, priority))

    def wait_for_completion(
        self, output_type: Any = RequestOutput, *, use_tqdm: bool | Progress = True
    ) -> list[RequestOutput]:
        """The answers to all that was enqueued, in that order, as `generate` gives them.

        Where it raises, what was enqueued is dropped.
        """
        kinds = (output_type,) if isinstance(output_type, type) else output_type or (RequestOutput,)
        if RequestOutput not in kinds:
            raise ValueError(f"wait_for_completion: output_type {output_type!r}: there is RequestOutput alone")
        jobs = self._queued
        self._queued = []
        return self._run(jobs, use_tqdm)

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        lora_request: Adapters = None,
        use_tqdm: bool | Progress = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, best first. concurrency_limit: prompts that are searched at a time."""
        from octavo.offline.answers import beams_of
        from octavo.offline.requests import Job, asked_by_beams

        self._model.check_generates()
        given = prompts_of(prompts)
        adapters = checked_adapters(lora_request, len(given))
        if concurrency_limit is not None and concurrency_limit < 1:
            raise ValueError(f"concurrency_limit is {concurrency_limit}; it must be 1 at least")
        model = self._model.model
        with python_errors():
            asked = asked_by_beams(params, model)
        jobs = [
            Job(self._next_id(), one, asked.adapted(adapter).own(one, 0))
            for one, adapter in zip(given, adapters, strict=True)
        ]
        outputs = self._run(jobs, use_tqdm, at_a_time=concurrency_limit or len(jobs) or 1)
        return [beams_of(output, one, params, model) for output, one in zip(outputs, given, strict=True)]

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json says, and vLLM's defaults for the rest."""
        return self._model.default_params()

    @property
    def max_model_len(self) -> int:
        """The most tokens of a prompt with its answer."""
        return self._model.model.max_model_len

    def get_tokenizer(self) -> Any:
        """The tokenizer, as transformers has it."""
        return self._model.tokenizer

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached prefixes that no running request uses. What else vLLM has is refused."""
        checked_reset(running=reset_running_requests, connector=reset_connector)
        self._thread.call(_soon(self._model.fleet.reset_prefix_cache))
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give memory back until `wake_up`: the KV cache's (level 1), or all of the engine's (level 2).

        With enable_sleep_mode=True. mode: what becomes of answers in other threads: they end now (abort), are waited
        for (wait), or go on after the wake-up (keep). Raises ValueError and EngineError.
        """
        self._thread.call(self._model.sleep(level, mode))

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Take memory again: weights, kv_cache, or all. Raises ValueError, and EngineError where it can't be had."""
        self._thread.call(self._model.wake_up(tags))

    def get_metrics(self) -> list[Metric]:
        """What has been counted since the start: the metrics of `octavo serve` at /metrics."""
        return self._thread.call(_soon(self._model.measured))

    def close(self) -> None:
        """End the engine. What runs in other threads ends with an EngineError. May be called again."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(missing("LLM", name))

    @property
    def pooled(self) -> PooledText | None:
        """What a model does that generates nothing: its tasks, prompts and labels; None: it generates."""
        return self._model.model.pooled

    def embed(
        self,
        prompts: Any,
        *,
        use_tqdm: bool | Progress = True,
        pooling_params: PoolingParams | None = None,
        **others: Any,
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of one prompt or many, in their order. prompts: as of `generate`.

        Of a model that embeds: an encoder, or with runner="pooling" any other one. Raises ValueError and EngineError.
        """
        checked_others("embed", others)
        found = self._pooled(prompts, pooling_params, "embed", use_tqdm)
        return [self._told(EmbeddingOutput(result.vector()), prompt) for prompt, result in found]

    def classify(
        self,
        prompts: Any,
        *,
        use_tqdm: bool | Progress = True,
        pooling_params: PoolingParams | None = None,
        **others: Any,
    ) -> list[ClassificationRequestOutput]:
        """The probabilities of a classifier's labels for one prompt or many, in their order."""
        checked_others("classify", others)
        found = self._pooled(prompts, pooling_params, "classify", use_tqdm)
        return [self._told(ClassificationOutput(result.vector()), prompt) for prompt, result in found]

    def encode(
        self,
        prompts: Any,
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: PoolingTask | None = None,
        use_tqdm: bool | Progress = True,
        **others: Any,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What the model's pooler makes of one prompt or many, as tensors of float32.

        pooling_task: embed, classify, token_embed or token_classify, of those that the model does; None: its first.
        """
        from octavo.offline.pooled import facts_of, tensor_of

        checked_others("encode", others)
        params = checked_params(pooling_params)
        _, task = facts_of(self._model, pooling_task or params.task)
        found = self._pooled(prompts, params, task, use_tqdm)
        return [self._told(PoolingOutput(tensor_of(result, task)), prompt) for prompt, result in found]

    def reward(
        self,
        prompts: Any,
        *,
        use_tqdm: bool | Progress = True,
        pooling_params: PoolingParams | None = None,
        **others: Any,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What a reward model says of one prompt or many: `encode` by its first task."""
        checked_others("reward", others)
        return self.encode(prompts, pooling_params, use_tqdm=use_tqdm)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Progress = True,
        pooling_params: PoolingParams | None = None,
        **others: Any,
    ) -> list[ScoringRequestOutput]:
        """How well texts fit each other: a cross-encoder's score of each pair, or the cosine of their embeddings.

        data_1: one text for all of data_2, or as many. truncate_prompt_tokens goes before that of pooling_params.
        """
        from octavo.offline.pooled import scores

        checked_others("score", others)
        one = [data_1] if isinstance(data_1, str) else list(data_1)
        other = [data_2] if isinstance(data_2, str) else list(data_2)
        if len(one) not in (1, len(other)) or not other:
            raise ValueError(f"score: {len(one)} texts and {len(other)}: one text for all or as many of both work")
        params = checked_params(pooling_params)
        if truncate_prompt_tokens is not None:
            params = replace(params, truncate_prompt_tokens=truncate_prompt_tokens)
        one = one * len(other) if len(one) == 1 else one

        async def run() -> list[tuple[float, PooledPrompt]]:
            with _bar(use_tqdm, len(other)) as update:
                return await scores(self._model, one, other, params, update)

        with seldom():
            found = self._thread.call(run())
        return [self._told(ScoringOutput(value), prompt) for value, prompt in found]

    def _pooled(
        self, prompts: Any, params: PoolingParams | None, task: PoolingTask | None, use_tqdm: bool | Progress
    ) -> list[tuple[PooledPrompt, PooledResult]]:
        from octavo.offline.pooled import pooled_prompts

        given = prompts_of(prompts)
        checked = checked_params(params)

        async def run() -> list[tuple[PooledPrompt, PooledResult]]:
            with _bar(use_tqdm, len(given)) as update:
                return await pooled_prompts(self._model, given, checked, task, update)

        self._model.fleet  # noqa: B018 (raises where it is closed)
        with seldom():
            return self._thread.call(run())

    def _told(self, output: Output, prompt: PooledPrompt) -> PoolingRequestOutput[Output]:
        return PoolingRequestOutput(self._next_id(), output, prompt.token_ids)

    def _next_id(self) -> str:
        return str(next(self._numbers))

    def _conversations(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        options: Mapping[str, Any],
        tools: list[dict[str, Any]] | None,
    ) -> list[Conversation]:
        from octavo.offline.requests import conversation_of

        many = [messages] if messages and isinstance(messages[0], Mapping) else messages
        model = self._model
        keeps = model.tells_apart
        with python_errors():
            return [conversation_of(one, options, tools, model.model, keeps=keeps) for one in many]  # type: ignore[arg-type]

    def _jobs(
        self,
        given: Sequence[Given | Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: Adapters,
        priority: int | Sequence[int] | None,
    ) -> list[Job]:
        from octavo.offline.requests import Job

        self._model.check_generates()
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        asked = self._asked(params, checked_adapters(lora_request, len(given)))
        priorities = _for_each(0 if priority is None else priority, len(given), "priority")
        return [
            Job(self._next_id(), one, how.own(one, number))
            for one, how, number in zip(given, asked, priorities, strict=True)
        ]

    def _keep(self, jobs: list[Job]) -> list[str]:
        """Raises ValueError where the name of an adapter means another one than in what is kept already."""
        if any(job.asked.adapter for job in jobs):
            queued = self._queued + jobs
            checked_adapters([job.asked.adapter for job in queued], len(queued))
        self._queued += jobs
        return [job.request_id for job in jobs]

    def _asked(
        self, params: SamplingParams | Sequence[SamplingParams], adapters: Sequence[LoRARequest | None]
    ) -> list[Asked]:
        """For each prompt; the same value where the parameters and the adapter are the same."""
        from octavo.offline.requests import asked_by

        each = _for_each(params, len(adapters), "sampling_params")
        with python_errors():
            known = {id(one): asked_by(one) for one in {id(one): one for one in each}.values()}
        pairs = [(id(one), adapter) for one, adapter in zip(each, adapters, strict=True)]
        of_pair = {pair: known[pair[0]].adapted(pair[1]) for pair in dict.fromkeys(pairs)}
        return [of_pair[pair] for pair in pairs]

    def _run(self, jobs: list[Job], use_tqdm: bool | Progress, at_a_time: int | None = None) -> list[RequestOutput]:
        """All answers. at_a_time: so many jobs together, and then the next ones."""
        from octavo.offline.batch import GROUP, Batch

        model = self._model
        model.fleet  # noqa: B018 (raises where it is closed)

        async def run() -> list[RequestOutput]:
            outputs: list[RequestOutput] = []
            await model.load(job.asked.adapter for job in jobs)
            size = at_a_time or len(jobs) or 1
            with _bar(use_tqdm, len(jobs)) as update:  # here, since Ctrl-C within tqdm would leave its lock taken
                for begin in range(0, len(jobs), size):
                    some = jobs[begin : begin + size]
                    outputs += await Batch(model, lambda _: update()).run(some, at_a_time or GROUP)
            return outputs

        with seldom():
            return self._thread.call(run())


def _for_each(value: Any, count: int, name: str) -> list[Any]:
    """One value for all, or a list of one for each."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} for {count} prompts; one for all or one for each works")
    return list(value)


async def _soon(work: Callable[[], Any]) -> Any:
    """Something short, in the thread that may do it."""
    return work()


@contextmanager
def _bar(wanted: bool | Progress, count: int) -> Iterator[Callable[[], object]]:
    """A bar of so many prompts; what is yielded is called for each that is answered."""
    if not wanted:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    make = wanted if callable(wanted) else tqdm
    bar = make(total=count, desc="Processed prompts", dynamic_ncols=True)
    try:
        yield lambda: bar.update(1)
    finally:
        bar.close()


def _end(model: OfflineModel, thread: LoopThread, owner: int) -> None:
    """End the engine and the thread; at the program's end, or when nobody has the LLM any more, too."""
    if os.getpid() != owner:  # a fork: they are the parent's
        return
    if thread.is_current:  # the collector has found it there
        threading.Thread(target=_end, args=(model, thread, owner)).start()
        return
    try:
        thread.call(model.close())
    except EngineError:
        pass
    finally:
        thread.end()
        model.kill()
