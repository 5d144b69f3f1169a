"""From a config to an engine that can serve: device, weights, cache, limits, a first run; each phase timed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import torch

from octavo.kernels.attention.token_rows import CacheType
from octavo.kernels.linear_attention.states import Cache, StateShape, with_blocks
from octavo.runtime.config import EngineConfig
from octavo.runtime.engine import Engine
from octavo.runtime.messages import PooledModel, Ready, StartupReport
from octavo.runtime.model import select_operators
from octavo.runtime.model.device import Device
from octavo.runtime.model.model import Model
from octavo.runtime.model.weights import OnLayer, load_model, untold
from octavo.runtime.offload.select import check_offload, open_offload
from octavo.runtime.parallel.group import ALONE, Group
from octavo.runtime.parallel.placement import num_cores
from octavo.runtime.scheduling.plan import SchedulerConfig
from octavo.runtime.source_messages import Source
from octavo.runtime.speculation.select import drafts_by_model, notes_of, speculation_of
from octavo.runtime.worker import kv_cache
from octavo.runtime.worker.device import free_memory, set_threads
from octavo.runtime.worker.graphs import StepGraphs
from octavo.runtime.worker.kv_layout import one_group
from octavo.runtime.worker.replays import StepReplays
from octavo.runtime.worker.warm_up import compile_steps, run_requests, run_steps
from octavo.runtime.worker.worker import Worker

if TYPE_CHECKING:
    from octavo.runtime.parallel.followers import Followers

COUNTS = ("block_size", "num_blocks", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens", "num_threads")
BLOCK_ID_BYTES = 4  # an entry of the block tables
SEQUENCE_BYTES = 48  # a sequence's share of the lists beside them: its slot number, and how many blocks it has
MAX_PROMPT_LOGITS_BYTES = 64 << 20  # what one step may spend on logits for prompt_logprobs; as much again for drafts


@dataclass(frozen=True)
class LoadedRank:
    """A rank's share of an engine, not run yet. weight_bytes: of all ranks."""

    model: Model
    caches: list[Cache]
    plan: kv_cache.CachePlan
    limits: SchedulerConfig
    weight_bytes: int
    notes: list[str]


def load_engine(
    config: EngineConfig,
    spawn_time: float,
    device: Device | None = None,
    *,
    index: int = 0,
    followers: Followers | None = None,
    on_layer: OnLayer = untold,
) -> tuple[Engine, Ready]:
    """An engine that has run once, and the table about it. Raises ValueError or OSError with what is wrong.

    spawn_time is time.time() of when the process was started: what came before this call is the phase 'import'.
    device None: the one that config names. index: which of a server's engines it is. followers: the engine's other
    ranks, where they have been started already. on_layer: see load_model.
    """
    clock = Phases(spawn_time)
    clock.end("import")
    followers = followers or _followers_of(config)
    if followers is not None:
        config = msgspec.structs.replace(config, num_threads=followers.threads)
    device, num_threads = prepare_device(config, device, clock)
    group = ALONE if followers is None else followers.join()
    rank = load_rank(config, device, group, clock, on_layer)
    model = rank.model
    if followers is not None:
        followers.open(rank.limits)
    with torch.inference_mode():
        warm_up(model, rank.caches, rank.limits, followers)
        clock.end("warm-up")
        graphs, replays = at_once(config, rank, clock)
    worker = Worker(model, rank.caches, rank.limits, graphs, replays)
    overlaps = device.torch_device.type != "cpu" or num_threads < num_cores()
    engine = _engine_of(worker, config, rank, followers, overlaps=overlaps)
    if config.kv_offloading_path is not None:
        engine.offload, told = open_offload(config, model, with_blocks(rank.caches), engine.scheduler.prefixes, index)
        rank.notes.extend(told)
        clock.end("kv offload")
    report = StartupReport(
        model=config.model,
        architecture=model.architecture,
        dtype=_name(model.dtype),
        device=_device_in_words(config, device, group, num_threads),
        kv_cache_dtype=(f"k={_name(model.dtype)},v=" if rank.plan.wide_keys else "") + _name(rank.plan.dtype),
        layers=model.report_layers(),
        weight_bytes=rank.weight_bytes,
        kv_cache_bytes=rank.plan.num_bytes,
        seconds=clock.seconds,
        notes=rank.notes + ([] if followers is None else followers.notes) + notes_of(config.speculative_config),
        ranks=list(model.ranks),
        deterministic=config.deterministic,
    )
    return engine, _ready(rank, report)


def _ready(rank: LoadedRank, report: StartupReport) -> Ready:
    model = rank.model
    return Ready(
        rank.limits.max_model_len,
        rank.plan.num_blocks,
        rank.plan.block_size,
        model.vocab_size,
        report,
        pooled_model(model),
        None if model.tower is None else model.tower.facts,
        model.source,
    )


def pooled_model(model: Model) -> PooledModel | None:
    """What the server is told of a model that generates nothing."""
    pooler = model.pooler
    if pooler is None:
        return None
    return PooledModel(pooler.tasks, pooler.size, pooler.dimensions, model.num_token_types, pooler.template)


def _engine_of(
    worker: Worker, config: EngineConfig, rank: LoadedRank, followers: Followers | None, *, overlaps: bool
) -> Engine:
    """With who gives its sequences drafts; a draft model or head is loaded here, and noted."""
    speculation = speculation_of(config, worker, rank.limits, rank.weight_bytes, rank.notes)
    return Engine(
        worker,
        rank.limits,
        config.seed,
        followers,
        overlaps=overlaps and not drafts_by_model(config.speculative_config),
        deterministic=config.deterministic,
        most_adapters=config.lora.most_loaded,
        speculation=speculation,
    )


def _followers_of(config: EngineConfig) -> Followers | None:
    if config.parallel.num_ranks == 1:
        return None
    from octavo.runtime.parallel.followers import Followers  # an engine of one rank needs nothing of it

    return Followers(config)


def _device_in_words(config: EngineConfig, device: Device, group: Group, num_threads: int) -> str:
    if device.torch_device.type != "cpu":
        return str(device.torch_device)
    if group.size == 1:
        return f"cpu, {num_threads} threads"
    nodes = config.parallel.nnodes
    machines = f" on {nodes} machines" if nodes > 1 else ""
    return f"cpu, {group.size} ranks{machines}, {num_threads} threads each"


def at_once(config: EngineConfig, rank: LoadedRank, clock: Phases) -> tuple[StepGraphs | None, StepReplays | None]:
    """What launches a step's kernels at once, where the model's steps can be captured, or recorded on a CPU."""
    model = rank.model
    limits = rank.limits
    if config.enforce_eager or model.pooler is not None:
        return None, None
    if model.capturable:
        sizes = (limits.max_num_seqs, limits.max_model_len, limits.max_num_batched_tokens)
        graphs = StepGraphs(model, rank.caches, *sizes)
        clock.end("cuda graphs")
        return graphs, None
    if not model.recordable:
        return None, None
    return None, StepReplays(model, rank.caches, limits.max_model_len, limits.block_size)


def prepare_device(config: EngineConfig, device: Device | None, clock: Phases) -> tuple[Device, int]:
    """The device, with its kernels compiled, and the number of CPU threads. Raises ValueError for what can't be."""
    check_limits(config)
    device = device or Device.choose(config.device)
    if config.lora.enable_lora and device.torch_device.type != "cpu":
        raise ValueError("--enable-lora: LoRA runs on the CPU so far; --device cpu works, or a merged checkpoint")
    check_machine(config, free_memory(device.torch_device))
    check_speculation(config, device.torch_device)
    num_threads = set_threads(config.num_threads)
    select_operators.warm_up(device.torch_device)
    clock.end("kernels")
    return device, num_threads


@torch.inference_mode()
def load_rank(
    config: EngineConfig, device: Device, group: Group, clock: Phases, on_layer: OnLayer = untold
) -> LoadedRank:
    """Weights and cache of this rank of a group. All ranks find the same limits."""
    model = load_model(config, device, group=group, on_layer=on_layer)
    if config.lora.enable_lora and model.adapters is None:
        raise ValueError(
            f"--enable-lora: adapters are served by octavo's own decoder, and {model.architecture} has none"
        )
    clock.end("weights")
    if not model.kv_shapes and model.pooler is not None:
        return without_cache(config, model, group)
    if model.source is not None:
        config = for_sources(config, model.source)
    if model.compiles_kernels:
        limits = limits_of(config, model, config.max_model_len or model.max_position)
        compile_steps(model, limits, kv_cache.choose_dtype(model, config.kv_cache_dtype, []))
        clock.end("compiling")
    check_states(config, model)
    notes = list(model.notes) + ([] if model.adapters is None else [model.adapters.note])
    caches, plan = kv_cache.create(model, config, notes, group)
    clock.end("kv cache")
    longest = choose_max_model_len(config, model.max_position, plan.capacity(model.max_position), notes)
    check_num_seqs(config, longest, _left_on_host(plan.num_bytes, device.torch_device))
    limits = limits_of(config, model, longest, plan)
    return LoadedRank(model, caches, plan, limits, sum(group.of_all(model.weight_bytes)), notes)


def for_sources(config: EngineConfig, source: Source) -> EngineConfig:
    """As many sequences as there are places for sources, and no prefix cache: tokens alone don't name a prefix."""
    most = min(config.max_num_seqs, source.places)
    return msgspec.structs.replace(config, max_num_seqs=most, enable_prefix_caching=False)


def without_cache(config: EngineConfig, model: Model, group: Group) -> LoadedRank:
    """Of an encoder, whose texts are computed whole. A block stands for a sequence's place, and for no memory."""
    longest = model.max_position
    notes = list(model.notes)
    if config.max_num_batched_tokens < longest:
        budget = config.max_num_batched_tokens
        notes.append(f"a step has {longest} tokens, not {budget}: the longest text is computed in one")
        config = msgspec.structs.replace(config, max_num_batched_tokens=longest)
    check_num_seqs(config, longest, free_memory(torch.device("cpu")))
    config = msgspec.structs.replace(config, block_size=longest, enable_prefix_caching=False)
    plan = kv_cache.CachePlan(model.dtype, 2 * config.max_num_seqs, longest, 0, one_group(0))
    limits = limits_of(config, model, longest, plan)
    return LoadedRank(model, [], plan, limits, sum(group.of_all(model.weight_bytes)), notes)


def limits_of(
    config: EngineConfig, model: Model, max_model_len: int, cache: kv_cache.CachePlan | None = None
) -> SchedulerConfig:
    """Limits of steps over this cache; without one, over a single block of all layers."""
    states = None if cache is None else cache.states
    return SchedulerConfig(
        num_blocks=1 if cache is None else cache.num_blocks,
        has_states=states is not None,
        num_snapshots=0 if states is None else states.num_snapshots,
        windows=(None,) if cache is None else cache.layout.windows,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs if states is None else states.num_slots,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        policy=config.scheduling_policy,
        priority_aging=config.priority_aging,
        jumps_forward=model.device.type == "cpu",  # a chunk of tokens among single ones runs without a GPU's graph
        stages=config.parallel.pipeline_parallel_size,
        tells_kv_events=config.kv_events_config.is_on,
        max_loras=config.lora.max_loras if config.lora.enable_lora else 0,
        max_prompt_logits=max(16, MAX_PROMPT_LOGITS_BYTES // (4 * model.vocab_size)),
        max_drafts=max(16, MAX_PROMPT_LOGITS_BYTES // (4 * model.vocab_size)),
        pools_all=model.pooler is not None and (not model.kv_shapes or model.pooler.kinds != ("last",)),
        whole_prompts=model.pooler is not None and not model.kv_shapes,
    )


def check_limits(config: EngineConfig) -> None:
    """Raise ValueError for a number that is out of range on every machine."""
    for name in COUNTS:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 at least")
    if config.kv_events_config.is_on and not config.enable_prefix_caching:
        raise ValueError(
            "--kv-events-config with --no-enable-prefix-caching: without a prefix cache there is nothing to tell; "
            "leave one of them out"
        )
    config.lora.check(is_apart=config.parallel.is_apart)
    check_offload(config)
    if config.speculative_config is not None:
        config.speculative_config.check(config.parallel.num_ranks, offloads=config.kv_offloading_path is not None)
    if config.max_model_len is not None and config.max_model_len < 2:
        raise ValueError(
            f"--max-model-len {config.max_model_len}: a prompt and an answer take 2 tokens at least; 2 or more works"
        )


def check_states(config: EngineConfig, model: Model) -> None:
    """Raise ValueError for what a model whose layers have states isn't served with."""
    if not any(isinstance(shape, StateShape) for shape in model.kv_shapes):
        return
    refused = {
        "--speculative-config": (config.speculative_config, "drafts that are wrong would stay in them"),
        "--kv-offloading-path": (config.kv_offloading_path, "they are not kept in a file"),
    }
    for flag, (given, why) in refused.items():
        if given is not None:
            raise ValueError(f"{flag}: layers of {model.architecture} have states, and {why}; leave it out")
    if config.kv_cache_dtype != "auto" and all(isinstance(shape, StateShape) for shape in model.kv_shapes):
        raise ValueError(
            f"--kv-cache-dtype {config.kv_cache_dtype}: all layers of {model.architecture} have states, which are "
            "float32, and there are no keys and values; leave it out"
        )


def check_machine(config: EngineConfig, free_bytes: int) -> None:
    """Raise ValueError for a size that this machine doesn't have. free_bytes is the device's free memory.

    Called before anything is loaded; kv_cache.plan_cache checks again with what the weights leave.
    """
    num_cpus = os.cpu_count() or 1
    ranks = len(config.parallel.local_ranks)
    if config.num_threads is not None and ranks == 1 and config.num_threads > num_cpus:
        raise ValueError(
            f"--num-threads {config.num_threads}: this machine has {num_cpus} CPUs, and threads beyond them only wait; "
            f"--num-threads {num_cpus} works"
        )
    if config.num_threads is not None and config.num_threads > 1 and ranks * config.num_threads > num_cpus:
        raise ValueError(
            f"--num-threads {config.num_threads} with {ranks} ranks: this machine has {num_cpus} CPUs, and threads "
            f"beyond them only wait; --num-threads {max(1, num_cpus // ranks)} works"
        )
    kv_cache.check_budget(config, free_bytes)
    check_num_seqs(config, None, free_memory(torch.device("cpu")))


def check_speculation(config: EngineConfig, device: torch.device) -> None:
    """Raise ValueError where drafts can't be checked."""
    if config.speculative_config is not None and device.type != "cpu":
        raise ValueError(
            f"--speculative-config on {device}: speculation runs on the CPU so far; leave it out, or --device cpu works"
        )


def check_num_seqs(config: EngineConfig, max_model_len: int | None, free_bytes: int) -> None:
    """Raise ValueError where the host's memory doesn't hold the tables of so many sequences.

    max_model_len None means that it is not known yet: one block is counted for each sequence.
    """
    per_sequence = SEQUENCE_BYTES + BLOCK_ID_BYTES * -(-(max_model_len or 1) // config.block_size)
    if config.max_num_seqs * per_sequence > free_bytes:
        default = EngineConfig(model="").max_num_seqs
        works = default if max_model_len is None else max(1, int(0.9 * free_bytes) // per_sequence)
        raise ValueError(
            f"--max-num-seqs {config.max_num_seqs}: the tables of that many sequences take at least "
            f"{config.max_num_seqs * per_sequence / 1e9:,.1f} GB, and {free_bytes / 1e9:,.1f} GB of memory are "
            f"free; --max-num-seqs {works} works"
        )


def _left_on_host(cache_bytes: int, device: torch.device) -> int:
    """Free memory of the host once a cache that lies there is filled: until then its pages count as free."""
    free = free_memory(torch.device("cpu"))
    return free - cache_bytes if device.type == "cpu" else free


def choose_max_model_len(config: EngineConfig, max_position: int, capacity: int, notes: list[str]) -> int:
    """The longest sequence: what the model can, if the cache can hold it; less (with a note) if nobody asked for more.

    capacity is the cache's, in tokens. A length that was asked for and can't be is an error with the largest that can.
    """
    wanted = config.max_model_len
    largest = min(max_position, capacity)
    if wanted is None:
        if capacity < max_position:
            notes.append(f"max_model_len is {capacity}, not the model's {max_position}: the KV cache holds no more")
        return largest
    if wanted > max_position:
        raise ValueError(f"--max-model-len {wanted}: the model has {max_position} positions; {largest} works")
    if wanted > capacity:
        raise ValueError(
            f"--max-model-len {wanted}: the KV cache holds {capacity} tokens; --max-model-len {largest} works, or a "
            "larger cache (--kv-cache-memory-bytes), or one of smaller numbers (--kv-cache-dtype)"
        )
    return wanted


def warm_up(model: Model, caches: list[Cache], limits: SchedulerConfig, followers: Followers | None = None) -> None:
    """Run what compiles or is built at first use.

    Also the first sign of broken weights: raises ValueError if the model's logits are not finite.
    """
    problem = run_requests(model, caches, limits, followers)
    if problem is not None:
        narrow = model.dtype == torch.float16
        hint = "; float16 may lack the range that its activations need: --dtype bfloat16" if narrow else ""
        raise ValueError(f"the model can't be run: {problem}{hint}")
    if model.compiles_kernels:
        run_steps(model, caches, limits)


class Phases:
    """Seconds between one `end` and the next."""

    def __init__(self, begin: float) -> None:
        self._last = begin
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        now = time.time()
        self.seconds[phase] = round(now - self._last, 3)
        self._last = now


def _name(dtype: CacheType) -> str:
    return str(dtype).removeprefix("torch.")
