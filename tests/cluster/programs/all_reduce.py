"""One rank of an all-reduce over gloo: prints the sum of all ranks' numbers. Run by torchrun in test_cluster.py."""

import socket
import sys

import torch
import torch.distributed as dist


def main() -> None:
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    place = f"rank {dist.get_rank()} of {dist.get_world_size()} on {socket.gethostname()}"
    sys.stdout.write(f"{place}: sum {total.item():g}\n")  # one write: the ranks of a pod share its log
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
