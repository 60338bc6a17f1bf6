"""Speed and memory beside peers, measured in one process and taking turns; `python jobs/benchmark.py` runs them."""
