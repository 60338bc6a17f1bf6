"""Score a model: `python jobs/evaluate.py --model models:/NAME@champion --data URL`."""

import argparse
import sys

from vswin_dist.errors import WorkFailed, run_command
from vswin_dist.evaluation.options import add_options, read_options


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="models:/NAME@alias, models:/NAME/3, or a checkpoint's folder or URL")
    parser.add_argument("--data", required=True, help="URL of the shards")
    parser.add_argument("--shuffle-frames", action="store_true", help="control: the same clips, frames in random order")
    parser.add_argument("--fresh", action="store_true", help="score again what was scored before")
    parser.add_argument("--top", type=int, default=None, metavar="K", help="log the best K classes of a video, not all")
    parser.add_argument("--no-report", action="store_true", help="make no page with pictures")
    add_options(parser, "the model's")
    args = parser.parse_args()
    asked = read_options(args, top=args.top)

    from vswin_dist.evaluation import report
    from vswin_dist.evaluation.analysis import analyse
    from vswin_dist.evaluation.launch import check, score

    model = report.find_model(args.model, asked.tracking_uri, asked.s3_endpoint)
    views = model.views(asked.clips, asked.crops, asked.batch, args.shuffle_frames)
    request = model.request(args.data, views, asked.workers, asked.s3_endpoint)
    check(request)
    report.check_tracking(model.tracking_uri)
    evaluation = score(request, asked.ranks, asked.use_gpu, asked.storage_root, args.fresh)
    scores, found = evaluation.scores, evaluation.predictions.found
    print(scores)
    for key, reason in scores.missing:
        print(f"missing: {key}: {reason}")
    analysis = analyse(found.probabilities, found.labels, evaluation.predictions.identity.classes)
    print(f"{analysis}\npredictions  {evaluation.url}", flush=True)  # whatever becomes of their run in the tracking store
    drawn = "" if args.no_report else report.draw(model, request.data, evaluation, asked.s3_endpoint)
    report.log(model, request.data, views, evaluation, analysis, asked.ranks, args.top, drawn)
    if scores.missing:
        raise WorkFailed(f"{len(scores.missing)} of {scores.expected} videos could not be scored")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
