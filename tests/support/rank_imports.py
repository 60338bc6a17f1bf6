"""What ranks and jobs import, loaded once by the process that they are forked from: seconds of computing saved for each.

Nothing of Ray, which takes its settings from the environment as it is imported; workers that are forked after it do not
reach their head.
"""

import gc
import multiprocessing
import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # else MLflow starts a thread, which no fork survives

import jsonschema  # noqa: F401
import mlflow
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import pyarrow.parquet  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
import torch._dynamo  # by ZeRO 3 and by models that are compiled

from vswin_dist.evaluation import analysis  # noqa: F401
from vswin_dist.tracking import mlflow_run  # noqa: F401
from vswin_dist.training import deepspeed_setup, trainer  # noqa: F401

deepspeed_setup.import_deepspeed(torch.device("cpu"))
MAIN_PROCESS = multiprocessing.current_process()  # of multiprocessing, for what is to be one
gc.collect()
gc.freeze()  # a collection in what is forked looks at none of it, and copies no page of it
