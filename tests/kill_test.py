"""Kills every command that trains or extracts at random moments and compares its end with an uninterrupted run.

    make kill-test                # 20 kills of each command
    make kill-test ARGS="--kills 3 --only grpo"

Outside the test suite, which kills each command once.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from toy_commands import ToyCommand, toy_commands


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each command, default: %(default)s")
    parser.add_argument("--only", nargs="*", help="names of commands, default: all")
    parser.add_argument("--signal", default="SIGKILL", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default: %(default)s")
    return parser


def is_begun(output: Path) -> bool:
    return any(output.rglob("checkpoint-*")) or any(output.glob("shard-*"))


def kill_and_resume(command: ToyCommand, output: Path, seconds: float, number: int) -> tuple[bool, float | None]:
    """
    Whether there was something to go on from when the signal came, after `seconds`; and how long it took, where it had
    ended before.
    """
    start = time.perf_counter()
    process = command.start(output)
    process.join(seconds)
    was_running = process.is_alive()
    if was_running:
        os.kill(process.pid, number)
    process.join()
    took = None if was_running else time.perf_counter() - start
    begun = is_begun(output)
    again = command.start(output)
    again.join()
    if again.exitcode != 0:
        print(output.with_suffix(".log").read_text()[-3000:], file=sys.stderr)
    return begun, took


def main() -> int:
    args = make_parser().parse_args()
    torch.set_num_threads(1)
    rng, failures = random.Random(args.seed), 0
    print("| command | seconds | kills | with a checkpoint | equal at the end |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        commands = toy_commands(Path(folder))
        for name, command in commands.items():
            if args.only and name not in args.only:
                continue
            whole = Path(folder, "runs", name, "whole")
            start = time.perf_counter()
            command.start(whole).join()
            seconds = time.perf_counter() - start
            expected, killed, begun, equal, life = command.result(whole), 0, 0, 0, 0
            while killed < args.kills:
                output, life = whole.with_name(f"killed-{life}"), life + 1
                moment = rng.uniform(0, seconds)
                had_begun, took = kill_and_resume(command, output, moment, signal.Signals[args.signal])
                if took is not None:  # it was faster this time
                    seconds = took
                    continue
                killed, begun = killed + 1, begun + had_begun
                equal += bool(expected) and command.result(output) == expected
            failures += killed - equal
            print(f"| {name} | {seconds:.1f} | {killed} | {begun} | {equal} |", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
