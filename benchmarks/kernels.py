"""Every Triton kernel on a GPU: right on fresh random inputs, then timed beside torch's own operators.

    PYTHONPATH=src python -m benchmarks.kernels [--only WORD] [--quick] [--output DIR] [--seconds 480]
    PYTHONPATH=src TRITON_INTERPRET=1 python -m benchmarks.kernels --rehearse     without a GPU: tiny shapes, no speeds

Needs torch and Triton, and of octavo the kernels alone. Each case: outputs poisoned, one run compared with float64;
then kernel and baselines in CUDA graphs over rotated inputs, replayed in turns (`gpu_clock`). The card's copy and read
bandwidth are measured first, and again at the end. A process of its own does the work, case by case: one that raises,
hangs or breaks the GPU's context is a row that says so, and the next begins in a new process. What the time doesn't
suffice for is named, and so is all that is left when two processes have ended before they had a GPU. Writes
kernels-DATE.md and .json after each case; ends with 1 if a kernel failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks import gpu_around, gpu_attention, gpu_gemms, gpu_moe, gpu_rows
from benchmarks.gpu_case import Bodies, Case, error_of
from benchmarks.gpu_clock import Call, Clock, CudaClock, HostClock, environment, one_line, poisoned
from benchmarks.gpu_table import Result, derive, geomeans, write

from octavo.kernels.launching.launch import INTERPRETED

OWN = "octavo"
MOST_SETS = 24  # of inputs
CASE_SECONDS = 75.0  # after which a case counts as hanging; compiling is in it
START_SECONDS = 120.0
END_SECONDS = 10.0  # the bandwidth once more
STARTS = 2  # without a GPU, after which no other is tried


def every_case(tiny: bool = False) -> list[Case]:
    return [case for room in (gpu_rows, gpu_gemms, gpu_attention, gpu_moe, gpu_around) for case in room.cases(tiny)]


def all_cases(args: argparse.Namespace) -> list[Case]:
    """Those that are asked for, a quick run's first."""
    wanted = [case for case in every_case(args.rehearse) if args.only in case.name and (case.first or not args.quick)]
    return sorted(wanted, key=lambda case: not case.first)


def main() -> int:
    args = parse_arguments()
    if not torch.cuda.is_available() and not args.rehearse:
        raise SystemExit("no CUDA device: --rehearse runs tiny shapes without one")
    if args.rehearse and not INTERPRETED:
        raise SystemExit("--rehearse runs in Triton's interpreter: set TRITON_INTERPRET=1")
    cases = all_cases(args)
    results: list[Result] = []
    facts: dict[str, Any] = environment()
    begun = time.monotonic()
    for result in results_of(cases, args, facts, begun):
        results.append(result)
        said = result.failure or f"{result.us:9.1f} us"
        print(f"{time.monotonic() - begun:5.0f} s {len(results):3d}/{len(cases)} {result.name}: {said}", flush=True)
        if args.output:
            write(args.output, "kernels", "Triton kernels and torch's operators", results, facts)
    failed = [result for result in results if result.failure and not result.failure.startswith("not run")]
    for name, value in geomeans(results).items():
        print(f"{name}: {value:.2f}")
    print(f"{len(results)} cases, {len(failed)} failed, in {time.monotonic() - begun:.0f} s; {facts}")
    for result in failed:
        print(f"FAILED {result.name}: {result.failure}")
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose name holds this, such as 'W4A16'")
    parser.add_argument("--quick", action="store_true", help="the most telling cases of each row")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, timed by the host: shows that all runs")
    parser.add_argument("--seconds", type=float, default=480.0, help="after which all is stopped (default 480)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the tables")
    args = parser.parse_args()
    if args.rehearse:
        args.output = None
    return args


def results_of(
    cases: list[Case], args: argparse.Namespace, facts: dict[str, Any], begun: float
) -> Iterator[Result]:  # fmt: skip
    """Each case's result, whatever becomes of the process that measures it, within the time."""
    context = multiprocessing.get_context("spawn")
    at, failed_starts, why = 0, 0, f"{args.seconds:.0f} s were over"

    def left() -> float:
        return float(args.seconds - END_SECONDS - (time.monotonic() - begun))

    while at < len(cases) and left() > 0:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(args, at, theirs), daemon=True)
        process.start()
        theirs.close()
        started = False
        try:
            patience = START_SECONDS
            while at < len(cases):
                late = left() < patience
                if not ours.poll(max(min(patience, left()), 0.0)):
                    raise TimeoutError(f"not run: {why}" if late else f"no answer in {patience:.0f} s")
                kind, value = ours.recv()
                patience = CASE_SECONDS
                if kind == "facts":
                    started = True
                    facts.update(value)
                else:
                    at += 1
                    yield value
            if ours.poll(END_SECONDS):  # the bandwidth once more
                facts.update(ours.recv()[1])
        except (EOFError, TimeoutError, ConnectionError) as error:
            if at < len(cases):
                case = cases[at]
                reason = str(error) if isinstance(error, TimeoutError) else "its process ended"
                at += 1
                yield Result(case.row, case.kernel, case.shape, failure=reason)
            failed_starts += not started
        finally:
            process.kill()
            process.join()
        if failed_starts == STARTS:
            why = f"{STARTS} processes ended before they had a GPU"
            break
    for case in cases[at:]:
        yield Result(case.row, case.kernel, case.shape, failure=f"not run: {why}")


def work(args: argparse.Namespace, first: int, connection: Any) -> None:
    """Measure the cases from one on; the process ends where the GPU can't be used any more."""
    cases = all_cases(args)
    clock: Clock = HostClock() if args.rehearse else CudaClock()
    torch.manual_seed(int(time.time()))
    bandwidth = clock.bandwidth()
    connection.send(("facts", {f"{name}, GB/s": round(value) for name, value in bandwidth.items()}))
    for case in cases[first:]:
        connection.send(("result", measure(case, clock, bandwidth["copy"])))
        try:
            clock.forget()
        except Exception:  # an error that sticks: the next process begins anew
            sys.exit(1)
    connection.send(("facts", {f"{name} at the end, GB/s": round(value) for name, value in clock.bandwidth().items()}))


@torch.inference_mode()
def measure(case: Case, clock: Clock, copy: float) -> Result:
    """Compare, then time."""
    result = Result(case.row, case.kernel, case.shape, tolerance=case.tolerance)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    try:
        with poisoned():
            bodies = case.make(device)
            outputs = bodies.run()
        result.error = error_of(bodies, outputs)
        del outputs
        if not result.error <= case.tolerance:
            result.failure = f"wrong: error {result.error:.1e}, at most {case.tolerance:.0e}"
        count = number_of_sets(case, clock.l2_bytes)
        result.warm = is_warm(case, clock.l2_bytes)
        sets = [bodies, *(case.make(device) for _ in range(count - 1))]
        times, problems = clock.together(by_body(sets))
        if OWN not in times:
            raise RuntimeError(problems[OWN])
        result.us, result.spread = times[OWN].us, times[OWN].spread
        result.baselines = {name: times[name].us if name in times else problems[name] for name in bodies.baselines}
        derive(result, case, copy)
    except Exception as error:
        result.failure = one_line(error)
    return result


def number_of_sets(case: Case, l2_bytes: int) -> int:
    """Sets of inputs that are more than three L2 caches together, two at the least."""
    return min(max(2, -(-3 * l2_bytes // max(case.num_bytes, 1))), MOST_SETS)


def is_warm(case: Case, l2_bytes: int) -> bool:
    """All sets of its inputs are fewer bytes than that."""
    return number_of_sets(case, l2_bytes) * case.num_bytes < 3 * l2_bytes


def by_body(sets: list[Bodies]) -> dict[str, list[Call]]:
    """Of each body its calls, one for each set of inputs."""
    own: list[Call] = [bodies.timed or bodies.run for bodies in sets]
    return {OWN: own} | {name: [bodies.baselines[name] for bodies in sets] for name in sets[0].baselines}


if __name__ == "__main__":
    sys.exit(main())
