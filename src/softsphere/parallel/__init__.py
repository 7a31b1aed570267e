"""Rows of a weight (classes) over the ranks of a process group of torch.distributed."""

from softsphere.parallel.agreement import Agreement
from softsphere.parallel.batch import Batch
from softsphere.parallel.clipping import clip_grad_norm_
from softsphere.parallel.functions import (
    all_rows,
    answers_of_all,
    on_all_ranks,
    own_part,
    own_sums,
    same_on_all,
    sum_of_losses,
    sum_of_parts,
)
from softsphere.parallel.optimizer_state import keep_whole_state
from softsphere.parallel.ranks import Ranks
from softsphere.parallel.sharding import Owners, RowsOfRanks, Sharding
from softsphere.parallel.shards import Shards, checksum, leave_out_of_ddp
from softsphere.parallel.traffic import Traffic, count_traffic
from softsphere.parallel.whole import (
    check_rows,
    local_rows,
    mesh_of_rows,
    own_rows,
    whole_tensor,
)

__all__ = [
    "Agreement",
    "Batch",
    "Owners",
    "Ranks",
    "RowsOfRanks",
    "Sharding",
    "Shards",
    "Traffic",
    "all_rows",
    "answers_of_all",
    "check_rows",
    "checksum",
    "clip_grad_norm_",
    "count_traffic",
    "keep_whole_state",
    "leave_out_of_ddp",
    "local_rows",
    "mesh_of_rows",
    "on_all_ranks",
    "own_part",
    "own_rows",
    "own_sums",
    "same_on_all",
    "sum_of_losses",
    "sum_of_parts",
    "whole_tensor",
]
