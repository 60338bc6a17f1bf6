"""The five most probable classes of video files: ``python jobs/predict.py --model models:/NAME@champion FILE ...``."""

import argparse
import sys

from vswin_dist.errors import PreflightError, at_least, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="models:/NAME@alias, models:/NAME/3, or a checkpoint's folder or URL")
    parser.add_argument("--clips", type=int, default=4, help="views in time")
    parser.add_argument("--crops", type=int, default=3, help="views in space")
    parser.add_argument("--gpu", action="store_true", help="on this machine's GPU")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--s3-endpoint", default=None)
    parser.add_argument("videos", nargs="+", metavar="FILE", help="paths or URLs of videos")
    args = parser.parse_args()
    at_least(1, clips=args.clips, crops=args.crops)

    import torch

    from vswin_dist.serving.predict import load_predictor
    from vswin_dist.storage import use_s3_endpoint

    if args.gpu and not torch.cuda.is_available():
        raise PreflightError("--gpu: torch sees no GPU on this machine. Leave --gpu out, or check the driver and torch.")
    use_s3_endpoint(args.s3_endpoint)
    predictor = load_predictor(args.model, uri=args.tracking_uri, clips=args.clips, crops=args.crops,
                               device="cuda" if args.gpu else "cpu")
    for prediction in predictor.predict(args.videos):
        print(prediction.video)
        for name, probability in prediction.top:
            print(f"  {probability:7.2%}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
