"""Write a small folder of captioned pictures to train on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from trainer.data.dummy import write_dummy_imagefolder
from trainer.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/make_dummy_imagefolder.py --output-dir smoke --num-images 4 --image-size 64",
    )
    parser.add_argument("--output-dir", required=True, help="folder to fill; made if it is not there")
    parser.add_argument("--num-images", type=int, required=True, help="how many pictures")
    parser.add_argument("--image-size", type=int, required=True, help="side of the square pictures, pixels")
    parser.add_argument("--seed", type=int, default=0, help="chooses places and sizes of the shapes (default: 0)")
    arguments = parser.parse_args()
    try:
        written = write_dummy_imagefolder(
            arguments.output_dir, arguments.num_images, arguments.image_size, arguments.seed
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.output_dir}: {arguments.num_images} pictures and metadata.jsonl, {written} files written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
