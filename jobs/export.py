"""Export a model: `python jobs/export.py models:/NAME@champion --to onnx --out URL`. What it answers is checked first."""

import argparse
import sys

from vswin_dist.errors import at_least, run_command

FORMS = ("torch-export", "onnx", "official", "torchvision", "microsoft-2d", "timm-2d", "huggingface")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="models:/NAME@alias, models:/NAME/3, or a checkpoint's folder or URL")
    parser.add_argument("--to", required=True, choices=FORMS, help="what it becomes: a file, or a folder (huggingface)")
    parser.add_argument("--out", default=None, metavar="URL", help="of the file or folder")
    parser.add_argument("--register", action="store_true", help="keep it among the artifacts of the model's run, too")
    shape = "frames, height and width of the clips; else those that the model was trained for"
    parser.add_argument("--clip", type=int, nargs=3, default=None, metavar=("T", "H", "W"), help=shape)
    parser.add_argument("--batch", type=int, default=None, metavar="B", help="clips at once; else any number")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit from the model's")
    parser.add_argument("--tracking-uri", default=None)
    parser.add_argument("--s3-endpoint", default=None)
    args = parser.parse_args()
    sizes = {"batch": args.batch} | dict(zip(("clip T", "clip H", "clip W"), args.clip or (), strict=False))
    at_least(1, **{name: value for name, value in sizes.items() if value is not None})

    from vswin_dist.export import export
    from vswin_dist.storage import use_s3_endpoint

    use_s3_endpoint(args.s3_endpoint)
    export.check_request(args.to, args.model, args.out, args.register)
    clip = tuple(args.clip) if args.clip else None
    subject, version = export.find_subject(args.model, args.tracking_uri, clip, args.batch)
    print(f"{subject.reference} {subject.model.settings['name']}, clips float32 {subject.clips}", flush=True)
    with export.exported(subject, args.to, args.tolerance) as made:
        for difference in made.differences:
            print(f"checked  {difference}", flush=True)
        if args.out:
            print(f"wrote  {export.publish(made, args.out)}  {made.size() / 1e6:.1f} MB", flush=True)
        if args.register and version:
            print(f"registered  {export.register(made, version, args.to, args.tracking_uri)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
