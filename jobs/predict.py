"""The most probable classes of videos: `python jobs/predict.py --model models:/NAME@champion FILE ...`.

Of a few files, on the screen. With --out of any number, in Parquet files, by all nodes of the Ray cluster.
"""

import argparse
import sys

from vswin_dist.errors import PreflightError, after_start, at_least, before_start, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="models:/NAME@alias, models:/NAME/3, or a checkpoint's folder or URL")
    parser.add_argument("--clips", type=int, default=4, help="views in time")
    parser.add_argument("--crops", type=int, default=3, help="views in space")
    parser.add_argument("--gpu", action="store_true", help="on this machine's GPU; with --out, one for each rank")
    parser.add_argument("--out", default=None, metavar="URL", help="folder for Parquet files, which all nodes reach")
    parser.add_argument("--top", type=int, default=5, help="classes of a video")
    parser.add_argument("--features", action="store_true", help="with --out: the features of the last stage, too")
    parser.add_argument("--ranks", type=int, default=None, help="with --out: processes; else one for each CPU, or GPU")
    parser.add_argument("--batch", type=int, default=12, help="views in one forward pass")
    parser.add_argument("--workers", type=int, default=1, help="with --out: threads of each rank that decode")
    parser.add_argument("--part", type=int, default=64, help="with --out: videos of a file")
    parser.add_argument("--fresh", action="store_true", help="with --out: forget what is there")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--s3-endpoint", default=None)
    where = "paths or URLs of videos; with --out also folders, buckets, shards, and lists (*.txt, one video in a line)"
    parser.add_argument("videos", nargs="+", metavar="FILE", help=where)
    args = parser.parse_args()
    counts = ("clips", "crops", "top", "batch", "workers", "part", "ranks")
    at_least(1, **{name: value for name in counts if (value := getattr(args, name)) is not None})

    import torch

    from vswin_dist.serving.predict import check_videos, load_predictor
    from vswin_dist.storage import use_s3_endpoint

    use_s3_endpoint(args.s3_endpoint)
    if args.out:
        from vswin_dist.serving.ray_data import Asked, predict_into

        predict_into(Asked(**vars(args)))
        return 0
    if args.gpu and not torch.cuda.is_available():
        raise PreflightError("--gpu: torch sees no GPU on this machine. Leave --gpu out, or check the driver and torch.")
    how = {"clips": args.clips, "crops": args.crops, "batch": args.batch, "device": "cuda" if args.gpu else "cpu"}
    with before_start():
        check_videos(args.videos)
        predictor = load_predictor(args.model, uri=args.tracking_uri, **how)
    with after_start("Leave it out to predict the others, or run the same command once that is mended."):
        for prediction in predictor.predict(args.videos, args.top):
            print(prediction.video)
            for name, probability in prediction.top:
                print(f"  {probability:7.2%}  {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
