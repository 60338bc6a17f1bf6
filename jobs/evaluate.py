"""Score a model: ``python jobs/evaluate.py --model models:/NAME@champion --data URL --clips 4 --crops 3``."""

import argparse
import sys

from vswin_dist.errors import WorkFailed, at_least, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="models:/NAME@alias, models:/NAME/3, or a checkpoint's folder or URL")
    parser.add_argument("--data", required=True, help="URL of the shards")
    parser.add_argument("--clips", type=int, default=4, help="views in time")
    parser.add_argument("--crops", type=int, default=3, help="views in space")
    parser.add_argument("--batch", type=int, default=8, help="views in one forward pass")
    parser.add_argument("--ranks", type=int, default=1, help="processes; more than one run on the Ray cluster")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each rank")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes of each rank")
    parser.add_argument("--shuffle-frames", action="store_true", help="control: the same clips, frames in random order")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--s3-endpoint", default=None)
    parser.add_argument("--storage-root", default=None, metavar="URL",
                        help="where Ray keeps its state while it runs; needed where the cluster has several nodes")
    args = parser.parse_args()
    at_least(1, clips=args.clips, crops=args.crops, batch=args.batch, ranks=args.ranks)
    at_least(0, workers=args.workers)

    from vswin_dist.evaluation import report
    from vswin_dist.evaluation.evaluate import Views
    from vswin_dist.evaluation.score_model import check
    from vswin_dist.training.launch import score

    views = Views(args.clips, args.crops, args.batch, args.shuffle_frames)
    model = report.find_model(args.model, args.tracking_uri, args.s3_endpoint)
    request = model.request(args.data, views, args.workers, args.s3_endpoint)
    check(request)
    report.check_store(model.tracking_uri)
    scores = score(request, args.ranks, args.gpu, args.storage_root)
    print(scores)
    for key, reason in scores.missing:
        print(f"missing: {key}: {reason}")
    sys.stdout.flush()  # whatever becomes of the entry in MLflow
    report.log(model, args.data, views, scores, args.ranks)
    if scores.missing:
        raise WorkFailed(f"{len(scores.missing)} of {scores.expected} videos could not be scored")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
