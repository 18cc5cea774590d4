"""The entry for `accelerate launch trainer/train.py` and `torchrun trainer/train.py`: the same as `difftrain train`."""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    # Run as a file, sys.path[0] is this folder: `import trainer` would fail in a checkout that is not installed, and
    # this package's modules would shadow libraries of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

    from trainer.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
