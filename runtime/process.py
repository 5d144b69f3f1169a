"""The engine process: `python -m octavo.runtime.process`, started by launch.py and spoken to through a socket.

It sends Ready or Failed first. Then its loop takes what has arrived, orders the next step while one is computed, takes
what arrives meanwhile, and sends what the step brought; without work it sleeps on the socket. Layer by layer it tells
that it gets on (progress.py). It ends on Shutdown, when its stdin closes (its parent is gone), or after Failed.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import zmq

from octavo.collector import uncollected
from octavo.freed_memory import keep_freed_memory
from octavo.runtime.arrivals import Arrivals
from octavo.runtime.kv_event_publisher import KVEventPublisher
from octavo.runtime.launch import EngineStart, heartbeat_address, progress_path, remove_socket
from octavo.runtime.link import Link
from octavo.runtime.messages import (
    AbortRequest,
    AddRequest,
    DropAdapter,
    Failed,
    LoadAdapter,
    Pause,
    Ping,
    Pong,
    ResetPrefixCache,
    Resume,
    Shutdown,
    Sleep,
    StepOutputs,
    TokenOutput,
    Vocabulary,
)
from octavo.runtime.parallel.lifeline import (
    end_with_parent,
    ignore_signals,
    one_line,
    read_line,
    says_it_all,
    start_heartbeat,
)
from octavo.runtime.progress import Progress
from octavo.runtime.shared_link import SharedLink

if TYPE_CHECKING:
    from octavo.runtime.engine import Engine
    from octavo.runtime.parallel.followers import Followers

LAST_WORDS_SECONDS = 2.0
SWITCH_SECONDS = 2e-4  # how long the thread that computes steps may wait for this one's Python code, and this for it


def main() -> int:
    """Run the engine until it is told to end; returns the exit code."""
    ignore_signals()  # the server drains first
    if len(sys.argv) != 2:
        raise SystemExit("the engine process is started by octavo itself: see octavo serve")
    address = sys.argv[1]
    line = read_line(0)
    if not line:  # whoever started it was ended at the same moment
        remove_socket(address)
        return 0
    start = msgspec.json.decode(line, type=EngineStart)
    if start.cores is not None:
        os.sched_setaffinity(0, start.cores)  # before torch is imported, which starts threads
    end_with_parent(lambda: _clean_up(address, start.config.parallel.nnodes))
    start_heartbeat(heartbeat_address(address))
    context = zmq.Context()
    link = open_link(context, address, start.addresses)
    progress = Progress(progress_path(address))
    is_loaded = False
    followers = None
    failure = ""
    publisher: KVEventPublisher | None = None
    try:
        publisher = _publisher_of(start)
        if start.config.parallel.num_ranks > 1:
            from octavo.runtime.parallel.followers import Followers

            followers = Followers(start.config, heartbeat_address(address))
        with uncollected():
            from octavo.runtime.startup import load_engine  # imports torch: seconds, in which a failure must be told
        engine, ready = load_engine(
            start.config, start.spawn_time, index=start.index, followers=followers, on_layer=progress.load
        )
        is_loaded = True
        if publisher is not None:
            ready.report.notes.extend(publisher.notes)
        link.send(ready)
        serve(engine, link, progress, publisher, followers)
        failure = "another engine is started in its place" if engine.is_replaced else ""
    except Exception as error:
        failure = one_line(error)
        link.send(Failed(failure, _traceback_of(error, is_loaded)))
        return 1
    finally:
        if publisher is not None:
            publisher.close()
        link.close()
        context.term()
        if followers is not None:
            followers.close(failure)
    return 0


def open_link(context: zmq.Context[zmq.Socket[bytes]], address: str, servers: Sequence[str]) -> Link | SharedLink:
    """The socket to the process that started this one, and those to further server processes, where there are any."""
    return SharedLink(context, address, servers) if servers else Link(context, address)


def _publisher_of(start: EngineStart) -> KVEventPublisher | None:
    events = start.config.kv_events_config
    return KVEventPublisher(events, start.index) if events.is_on else None


def _clean_up(address: str, nodes: int) -> None:
    """The server is gone, or is about to be: then it has said so, and other machines are to be told."""
    if nodes > 1:
        time.sleep(LAST_WORDS_SECONDS)
    remove_socket(address)


def _traceback_of(error: Exception, is_loaded: bool) -> str:
    """Nothing while loading, where the message says all: a model or a flag that is the user's to mend."""
    return "" if says_it_all(error) and not is_loaded else traceback.format_exc()


def serve(
    engine: Engine,
    link: Link | SharedLink,
    progress: Progress,
    publisher: KVEventPublisher | None = None,
    followers: Followers | None = None,
) -> None:
    """The loop. Returns on Shutdown. Raises EndedError when another rank ends."""
    sys.setswitchinterval(SWITCH_SECONDS)
    keep_freed_memory()
    is_watched = engine.worker.watch(progress.mark)
    arrivals = Arrivals()
    link.wake_for(engine.grammars.ready)
    if engine.adapters is not None:
        link.wake_for(engine.adapters.ready)
    if engine.offload is not None:
        link.wake_for(engine.offload.ready)
    if followers is not None:
        followers.watch(progress.mark)
        link.wake_for(followers.ended)  # else the end of one would be noticed by the next request
    done = engine.executor.done
    while True:
        outputs: list[TokenOutput] = []
        if not engine.has_work and not arrivals:
            progress.rest()
            link.wait()
        if is_watched:
            progress.work()
        if not take_messages(engine, link, arrivals, outputs):
            return
        if followers is not None:
            followers.check()
        engine.advance()
        while done is not None and engine.is_computing and link.comes_before(done):
            if not take_messages(engine, link, arrivals, outputs):
                return
            engine.admit()
        outputs += engine.finish()
        link.send(StepOutputs(outputs, engine.stats()))
        if publisher is not None:
            publisher.publish(engine.scheduler.take_kv_events())


def take_messages(engine: Engine, link: Link | SharedLink, arrivals: Arrivals, outputs: list[TokenOutput]) -> bool:
    """Do what the messages that have arrived ask for, and add to outputs what is refused. Returns False on Shutdown.

    Requests are taken last, and only as many as a step can wait for.
    """
    for message in link.receive():
        match message:
            case AddRequest():
                outputs += arrivals.add(message)
            case AbortRequest():
                engine.scheduler.abort(arrivals.abort(message.request_ids))
            case Ping():
                link.send(Pong(message.nonce))
            case Pause():
                engine.is_paused = True
            case Resume():
                engine.is_paused = False
            case Sleep():
                last, asleep = engine.sleep()
                outputs += last
                link.send(asleep)
            case Vocabulary():
                engine.grammars.set_vocabulary(message)
            case LoadAdapter():
                if (told := engine.load_adapter(message)) is not None:
                    link.send(told)
            case DropAdapter():
                engine.drop_adapter(message.digest)
            case ResetPrefixCache():
                engine.forget_prefixes()
            case TokenOutput():
                outputs.append(message)
            case Shutdown():
                engine.is_replaced = not message.is_final
                engine.close()
                return False
    for request, request_ids in arrivals.take():
        outputs += engine.add(request, request_ids)
    outputs += engine.take_grammars()
    engine.take_fetched()
    read, refused = engine.take_adapters()
    outputs += refused
    for one in read:
        link.send(one)
    return True


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end takes a second with torch in it, and now and then a minute
