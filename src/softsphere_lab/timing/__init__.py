"""The one way in which this project measures time and memory.

`setting` says how large a problem is, `training_steps` and `linear_losses` list what can be timed,
`softmax_peers` says which softmaxes heads of language models are compared with and `head_measures`
what is measured of them,
`processes` times one of them in a process of its own, `clock` compares several in one process,
`memory` counts bytes, and `benchmark` is the command line of the scripts in `benchmarks/`.
"""
