"""What a training needs before it runs: memory of a rank, time of a step, and how far more GPUs pay.

`python -m vswin_dist.planning --recipe NAME --gpus N --gpu KIND` prints it; preflight compares the memory with the nodes'.
"""
