"What a job costs, for the tests of several bricks."

import time

import torch


def cpu_seconds(job):
    "Of this process: others at work beside it do not count."
    start = time.process_time()
    job()
    return time.process_time() - start


def assert_cheap(ours, plain, times=1.0):
    "On one thread, in one of three rounds, ours takes at most so many times the CPU time of the plain one."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):  # in turns, and warm by now; whoever else uses the machine can only make it worse
            seconds = cpu_seconds(ours), cpu_seconds(plain)
            print([round(s, 2) for s in seconds])
            if seconds[0] <= times * seconds[1]:
                return
    finally:
        torch.set_num_threads(threads)
    raise AssertionError(f"ours took more than {times} of the CPU time in each of three rounds")
