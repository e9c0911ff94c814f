"""`make chaos`: runs every fault test and writes the table of docs/RELIABILITY.md.

    python -m tests.chaos [--fast] [--only WORD] [--resume]

Each row of FAULTS is one fault with the test that injects it. Every test is run, and the table says
so; results are kept in runs/chaos.json after each, so with `--resume` a run that was interrupted
goes on where it stopped. What stands outside the table's markers on the page is left alone.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "runs" / "chaos.json"
PAGE = ROOT / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- table: make chaos -->", "<!-- end of table -->"

# fault, how it is injected, what is promised, test, whether it is slow
FAULTS = [
    (
        "a rank is killed, at random moments and while it writes a checkpoint",
        "SIGKILL, twice in one run, torchrun's agent restarts; checkpoints written at once and in "
        "the background",
        "final weights, optimizer and metrics bit-equal; no temporary folder left; the test counts "
        "the kills",
        "test_faults.py::test_kills_at_random_moments_end_bit_equal",
        False,
    ),
    (
        "the same, 50 kills, 2 ranks, checkpoints written at once",
        "SIGKILL, ten of them inside a checkpoint's write",
        "the same",
        "test_faults.py::test_fifty_kills_at_random_moments_end_bit_equal[2]",
        True,
    ),
    (
        "the same, 50 kills, 3 ranks, checkpoints written in the background",
        "SIGKILL, ten of them inside a checkpoint's write",
        "the same",
        "test_faults.py::test_fifty_kills_at_random_moments_end_bit_equal[3]",
        True,
    ),
    (
        "a rank is killed under FSDP",
        "SIGKILL while weights and optimizer are divided over the ranks",
        "the same",
        "test_sharding.py::test_losses_equal_ddp_and_a_kill_is_exact[fsdp-2]",
        False,
    ),
    (
        "a kill between a checkpoint and its evaluation",
        "SIGKILL",
        "no metrics line is lost or doubled",
        "test_resume.py::test_a_kill_between_checkpoint_and_evaluation_loses_no_line",
        False,
    ),
    (
        "a rank blocks",
        "a deadlock in its loader",
        "named with step, phase and Python stack; job ends, restarts, ends bit-equal",
        "test_faults.py::test_a_rank_that_hangs_is_named_and_the_job_restarts[block]",
        False,
    ),
    (
        "a rank is stopped",
        "SIGSTOP",
        "named with its last heartbeat (step, phase); job ends, restarts, ends bit-equal",
        "test_faults.py::test_a_rank_that_hangs_is_named_and_the_job_restarts[stop]",
        False,
    ),
    (
        "a peer dies for good",
        "SIGKILL without a restart",
        "the others say so and leave; the last checkpoint stands",
        "test_preemption.py::test_a_dead_peer_is_told_and_nothing_is_saved",
        False,
    ),
    (
        "preemption notice",
        "SIGTERM or SIGUSR1 to one rank, then a second signal",
        "all ranks stop after the same step, one checkpoint, marker; the rest is exact",
        "test_preemption.py::test_all_ranks_stop_after_the_same_step_and_the_rest_is_exact",
        False,
    ),
    (
        "preemption notice to torchrun, loader workers alive",
        "SIGTERM to torchrun",
        "a checkpoint and the `preempted` marker; --resume auto goes on",
        "test_train_command.py::test_torchrun_told_to_go_leaves_a_checkpoint_and_its_marker",
        False,
    ),
    (
        "NaN in one rank's gradient",
        "a hook multiplies one gradient of rank 1 by NaN; policies stop, skip, rewind",
        "all ranks agree; tensor, rank and rows are written down",
        "test_faults.py::test_nan_in_one_ranks_gradient",
        False,
    ),
    (
        "loss spike",
        "loss and gradient of one step times 100, policy rewind",
        "back to the last good checkpoint, its rows passed over, also after a restart",
        "test_faults.py::test_a_spike_rewinds_over_its_last_rows_and_a_restart_remembers",
        False,
    ),
    (
        "what made a step bad",
        "a learning rate that overflows; `nanolm doctor RUN STEP`",
        "the step is taken again, bit for bit, and the first non-finite tensor named",
        "test_doctor.py",
        False,
    ),
    (
        "silent corruption of one rank's weights",
        "a bit is flipped in rank 1 of 3",
        "found at the next comparison; rank and first tensor named",
        "test_faults.py::test_a_flipped_bit_in_one_ranks_weights_is_found",
        False,
    ),
    (
        "a slow rank",
        "100 ms more a step on rank 1",
        "named with its ratio; step times by phase in the metrics",
        "test_faults.py::test_a_slow_rank_is_named_with_its_ratio",
        False,
    ),
    (
        "a damaged checkpoint",
        "a flipped bit in the newest",
        "said so; the one before is used",
        "test_resume.py::test_a_damaged_checkpoint_is_told_and_the_one_before_is_used",
        False,
    ),
    (
        "a missing, truncated or altered file",
        "each file of a checkpoint in turn",
        "named with the reason",
        "test_checkpoint.py",
        False,
    ),
    (
        "disk full during a checkpoint",
        "ENOSPC in the second file",
        "told; the last checkpoint is intact, nothing of the attempt stays",
        "test_checkpoint.py::test_a_full_disk_is_told_and_leaves_the_last_checkpoint_intact",
        False,
    ),
    (
        "disk full, a signal or the end while a checkpoint is written in the background",
        "ENOSPC on one of two ranks; SIGTERM; a disk that is slow",
        "all ranks tell the same sentence; preemption and the end wait; the same bits",
        "test_async_checkpoint.py",
        False,
    ),
    (
        "nodes without a common disk; a node's disk is lost",
        "a run.dir for each node; SIGKILL; a folder is removed from one",
        "goes on from the newest step that all have, or says which node lacks what",
        "test_nodes.py",
        False,
    ),
    (
        "another number of ranks, another strategy",
        "2 fsdp, 3 fsdp, 2 ddp, 1: a stage each",
        "the same losses to 1e-5 as one process from start to end",
        "test_sharding.py::test_any_strategy_goes_on_from_any_other",
        False,
    ),
    (
        "4, then 2, then 3 ranks",
        "60 steps in three stages, ddp and fsdp",
        "the same rows in the same order; loss curve to 1e-4",
        "test_sharding.py::test_four_then_two_then_three_ranks_take_the_same_batches",
        True,
    ),
    (
        "a network link is cut for 5 s",
        "two nodes as network namespaces, `ip link set down`",
        "training goes on, bit-equal",
        "test_network.py::test_a_link_that_is_cut_for_five_seconds_changes_nothing",
        True,
    ),
    (
        "a network link is cut for good",
        "the same, not restored",
        "a message names the node within the time-out; later the run goes on, bit-equal",
        "test_network.py::test_a_link_that_is_cut_for_good_names_the_node_and_the_run_goes_on_later",
        True,
    ),
    (
        "a link with 200 ms delay and 5 % loss, which is then cut",
        "netem, or a relay between TUN devices in user space",
        "training goes on; the cut names the node; later the run goes on over it, bit-equal",
        "test_network.py::test_a_slow_link_that_loses_packets_is_borne_and_its_end_is_told",
        True,
    ),
    (
        "a logging service that fails",
        "W&B that raises, hangs or cannot be reached",
        "training never stops for it",
        "test_sinks.py",
        False,
    ),
    (
        "damaged or hostile input",
        "mutated configs, manifests, Arrow shards, checkpoints, records; limits on memory and time",
        "accepted rightly or refused in one sentence; nothing is unpickled",
        "test_fuzz.py::test_mutated_inputs",
        False,
    ),
    (
        "storage that fails under the data",
        "a proxy before an S3 server: 500s, slow answers, bodies cut short, flipped bytes",
        "the same rows in the same order; what no retry mends is one sentence",
        "test_remote_shards.py",
        False,
    ),
    (
        "damaged or hostile input, 10,000 of them",
        "the same, 2,000 of each kind",
        "the same",
        "test_fuzz.py::test_ten_thousand_mutated_inputs",
        True,
    ),
]


def run_test(test):
    """(outcome, seconds): passed, failed, or skipped with pytest's reason."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-rs", f"tests/{test}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        print(done.stdout[-4000:])
        return "FAILED", seconds
    skips = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    return (f"skipped: {skips[0].split(': ', 1)[-1]}" if skips else "passed"), seconds


def write_page(results):
    rows = ["| fault | how it is injected | what is promised | test | last result |"]
    rows.append("|---|---|---|---|---|")
    for fault, how, promise, test, _ in FAULTS:
        last = results.get(test)
        shown = f"{last['outcome']}, {last['seconds']:.0f} s, {last['date']}" if last else "not run"
        rows.append(f"| {fault} | {how} | {promise} | `{test}` | {shown} |")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    run = [results[test] for _, _, _, test, _ in FAULTS if test in results]
    minutes = sum(result["seconds"] for result in run) / 60
    machine = (
        f"Machine: {platform.machine()}, {os.cpu_count()} cores. {len(run)} of {len(FAULTS)} rows "
        f"were run, in {minutes:.0f} minutes together."
    )
    table = "\n".join([BEGIN, "", machine, "", *rows, "", END])
    PAGE.write_text(head + table + tail, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--fast", action="store_true", help="without the slow tests")
    parser.add_argument("--resume", action="store_true", help="keep what passed today")
    parser.add_argument("--only", default="", help="tests whose name holds this word")
    options = parser.parse_args()
    partial = options.resume or options.only or options.fast
    known = RESULTS.is_file() and partial
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if known else {}
    today = datetime.date.today().isoformat()
    RESULTS.parent.mkdir(exist_ok=True)
    for fault, _, _, test, slow in FAULTS:
        fresh = results.get(test, {}).get("date") == today
        passed = results.get(test, {}).get("outcome") == "passed"
        kept = options.resume and fresh and passed
        if (slow and options.fast) or options.only not in test or kept:
            continue
        outcome, seconds = run_test(test)
        print(f"{outcome:>8}  {seconds:6.1f} s  {fault}", flush=True)
        results[test] = {"outcome": outcome, "seconds": seconds, "date": today}
        RESULTS.write_text(json.dumps(results, indent=1), encoding="utf-8")
        write_page(results)
    write_page(results)
    return int(any(entry["outcome"] == "FAILED" for entry in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
