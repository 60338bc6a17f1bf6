"""Register a 2D Swin checkpoint as an inflated video model, for the model of a recipe.

`python jobs/inflate.py --weights FILE --recipe NAME --register NAME`
"""

import argparse
import sys
import tempfile
from pathlib import Path

from vswin_dist import storage
from vswin_dist.config import load_settings
from vswin_dist.errors import after_start, before_start, run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True, help="2D Swin checkpoint: a file or URL")
    parser.add_argument("--recipe", required=True, help="the recipe whose model is to start from it")
    parser.add_argument("--register", required=True, help="name of the registered model")
    parser.add_argument("--alias", default="inflated", help="of the new version (%(default)s); see docs/training.md")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the recipe's")
    args = parser.parse_args()
    settings = load_settings(args.recipe, [*args.settings, "data.train=unused"])

    from vswin_dist.models.weights.portable import write_model
    from vswin_dist.serving import PYFUNC_CODE
    from vswin_dist.tracking import Registry, redact, source_version, tracking_uri
    from vswin_dist.training.description import describe_inflated
    from vswin_dist.training.initial_model import load, random_model

    storage.use_s3_endpoint(settings.storage.s3_endpoint)
    registry = Registry(tracking_uri(settings.tracking.uri))
    with before_start():
        registry.check_names(args.register, args.alias)
    source = storage.absolute(args.weights)
    model = random_model(settings, num_classes=400)  # of its head, which no training run takes over
    with before_start():
        print(load(model, source, settings))
    commit = source_version(Path(__file__).parents[1])
    lineage = {"inflated_from": redact(source), "source_commit": commit, "recipe": settings.recipe}
    description = describe_inflated(settings, source, commit)
    with tempfile.TemporaryDirectory(prefix="vswin-inflate-") as folder:
        # The head keeps no class names, and the card no preprocessing: a training run decides both.
        write_model(folder, model, classes=[], preprocessing={}, lineage=lineage)
        with after_start("Once that is mended, the same command registers it."):
            registered = registry.register(
                args.register, folder, alias=args.alias, tags=lineage, pyfunc=PYFUNC_CODE, description=description
            )
            aliases = registry.find(registered).aliases
    print(f"registered {registered} (alias {', '.join(aliases)})")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
