"""lm-eval's tasks on octavo: `HarnessModel` answers its requests by an `octavo.LLM`, as a server would.

lm-eval is the extra `eval`, which importing this module needs. What is asked is what lm-eval's own `hf` model asks:
the same tokens, special ones where the tokenizer adds them, and a context that is too long loses its beginning. Its
log-likelihoods go up to one token less of the context, since a request of octavo leaves a token to be generated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from octavo.jobs.task_scores import TaskError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM
    from octavo.outputs import RequestOutput

ASKED_AT_ONCE = 512  # requests: log-probabilities of all their tokens are held until they are added up
MAX_NEW_TOKENS = 256  # of a task that doesn't say, as in lm-eval
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
Progress = Callable[[float, float, str], None]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An `octavo.LLM` as a model of lm-eval, for `lm_eval.simple_evaluate(model=...)`."""

    def __init__(self, llm: LLM, progress: Progress = lambda *_: None) -> None:
        super().__init__()
        self._llm = llm
        self._progress = progress
        self.tokenizer = llm.get_tokenizer()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; the last turn goes on where no answer is asked for."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Special tokens as the tokenizer adds them, unless the text begins with one, as a chat template's does."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not (begin and string.startswith(begin))
        token_ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return token_ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: the sum of log-probabilities, and whether it is greedy."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Of each whole text, in windows of the longest context."""
        pairs: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._most_scored - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((None, context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (total, _is_greedy) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            sums[owner] += total
        return sums

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """The answer to each prompt, up to where one of its stop strings begins."""
        prompts = []
        params = []
        stops: list[list[str]] = []
        for number, request in enumerate(requests):
            context, asked = request.args
            how = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
            until = [text for text in handle_stop_sequences(how.pop("until", None), eos=None) if text]
            most = int(how.pop("max_gen_toks"))
            room = self._llm.max_model_len - most
            if room < 1:
                raise TaskError(f"a task wants answers of {most} tokens, and the model has {self._llm.max_model_len}")
            prompts.append(self.tok_encode(context)[-room:])
            params.append(self._params(how, until, most, seed=number))
            stops.append(until)
        outputs = self._generate(prompts, params, "answers")
        return [
            postprocess_generated_text(output.outputs[0].text, until, None)
            for output, until in zip(outputs, stops, strict=True)
        ]

    def _params(self, how: dict[str, Any], until: Sequence[str], most: int, *, seed: int) -> SamplingParams:
        """Greedy unless the task says otherwise. Stop strings that are tokens of their own never get into the text."""
        samples = bool(how.pop("do_sample", False))
        known = {name: how.pop(name) for name in SAMPLING if name in how}
        if how:
            raise TaskError(f"a task wants {', '.join(sorted(how))} for its answers, which octavo does not have")
        if not samples:
            known = {"temperature": 0.0}
        own = self.tokenizer.get_added_vocab()
        return SamplingParams(
            **known,
            max_tokens=most,
            seed=seed if samples else None,
            stop=[text for text in until if text not in own],
            stop_token_ids=[own[text] for text in until if text in own],
        )

    @property
    def _most_scored(self) -> int:
        return self._llm.max_model_len - 1

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [(context + continuation)[-self._most_scored :] for _, context, continuation in requests]
        found = []
        for begin in range(0, len(prompts), ASKED_AT_ONCE):
            some = slice(begin, begin + ASKED_AT_ONCE)
            outputs = self._generate(prompts[some], params, "log-likelihoods", begin, len(prompts))
            found += [
                _score_of(output, len(continuation))
                for output, (_, _, continuation) in zip(outputs, requests[some], strict=True)
            ]
        return found

    def _generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams],
        what: str,
        begin: int = 0,
        total: int | None = None,
    ) -> list[RequestOutput]:
        whole = len(prompts) if total is None else total
        self._progress(begin, whole, what)
        return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def _score_of(output: RequestOutput, length: int) -> tuple[float, bool]:
    """Of a prompt's last `length` tokens."""
    assert output.prompt_logprobs is not None
    first = max(0, len(output.prompt_token_ids) - length)
    told = [
        entry[token_id]
        for entry, token_id in zip(output.prompt_logprobs[first:], output.prompt_token_ids[first:], strict=True)
        if entry is not None  # of a first token: nothing stands before a continuation that fills the whole context
    ]
    return sum(token.logprob for token in told), all(token.rank == 1 for token in told)


def run_tasks(
    llm: LLM,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """What lm-eval's `simple_evaluate` returns for these tasks, with every item. Raises TaskError.

    folder: of task files; its names go before lm-eval's own. chat: prompts go through the model's chat template.
    """
    manager = _manager(names, folder)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        results: dict[str, Any] = simple_evaluate(
            model=HarnessModel(llm, progress),
            tasks=list(names),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,  # standard errors come out of the items
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            task_manager=manager,
        )
    except (ConnectionError, FileNotFoundError) as e:  # a data set of the Hub, where there is none
        raise TaskError(f"the data of {', '.join(names)} can't be had: {e}") from e
    return results


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Looks at lm-eval's own tasks, of which there are thousands, only where the folder doesn't have all."""
    if folder is not None:
        if not folder.is_dir():
            raise TaskError(f"--tasks-path {folder} is no directory")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            where = "lm-eval has no task" if folder is None else f"neither lm-eval nor {folder} has a task"
            raise TaskError(f"{where} {name}; `lm-eval ls tasks` lists lm-eval's own")
    return manager
