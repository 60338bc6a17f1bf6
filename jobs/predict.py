"""The five most probable classes of video files: ``python jobs/predict.py --model models:/NAME@champion FILE ...``."""

import argparse
import sys

from vswin_dist.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="models:/NAME@alias, models:/NAME/3, or a checkpoint's folder or URL")
    parser.add_argument("--clips", type=int, default=4, help="views in time")
    parser.add_argument("--crops", type=int, default=3, help="views in space")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("videos", nargs="+", metavar="FILE", help="paths or URLs of videos")
    args = parser.parse_args()

    from vswin_dist.serving.predict import load_predictor

    predictor = load_predictor(args.model, uri=args.tracking_uri, clips=args.clips, crops=args.crops)
    for prediction in predictor.predict(args.videos):
        print(prediction.video)
        for name, probability in prediction.top:
            print(f"  {probability:7.2%}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
