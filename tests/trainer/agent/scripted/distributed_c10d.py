"""Named as torch's file: a stack with a frame in it is that of a rank that waits for others."""

import time


def all_reduce():
    time.sleep(3600)
