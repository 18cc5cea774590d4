"""What a run says of itself to people when it starts and when it has ended."""

from __future__ import annotations

import shlex
from pathlib import Path

from torch import nn

from trainer.data.captions import possible_captions
from trainer.hooks.progress import duration
from trainer.loop import Say
from trainer.training import Training

MOST_COUNTED = 20_000  # records whose captions are counted at a start: a second's work
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def describe(training: Training) -> list[str]:
    """What was built, as lines for the start of a run."""
    config, runtime = training.config, training.runtime
    components = training.components
    sizes = [f"unet {_count(components.unet)}"]
    for name in ("text_encoder", "vae"):
        what, precision = name.replace("_", " "), f" in {config.model.vae_precision}" if name == "vae" else ""
        here = components.loaded(name)
        sizes.append(f"{what} {_count(getattr(components, name))}{precision}" if here else f"{what} not loaded: cached")
    source = components.provenance
    revision = f"@{source.revision}" if source.revision else ""
    lr = config.lr
    trained_as = components.scheduler.get("prediction_type")
    layers = [layer for network in training.state.modules.values() for layer in network.modules()]
    drops = any(isinstance(layer, DROPOUTS) and layer.p > 0 for layer in layers)
    mismatch = trained_as is not None and trained_as != config.objective.kind
    return [
        f"model  {source.source}{revision}: {', '.join(sizes)}",
        f"loss   {config.objective.kind}, {config.weighting.kind} weighting, {config.timesteps.kind} timesteps; "
        f"{config.optimizer.kind}, {lr.kind} lr {lr.peak:g} after {lr.warmup_steps} warm-up steps",
        f"ranks  {runtime.world_size} on {runtime.device.type}, {config.train.precision}, seed {config.train.seed}"
        f"{', deterministic' if config.train.deterministic else ''}",
        *([f"note   this model was trained to predict {trained_as}, not {config.objective.kind}"] if mismatch else []),
        *(["note   this model has dropout, and what it drops depends on the micro batch"] if drops else []),
        f"output {training.run_dir.path}",
    ]


def over_long(training: Training) -> list[str]:
    """How many captions the text encoder cannot read to their end, if there are any; of much data, in a part of it."""
    config, records = training.config, training.samples.records
    family, tokenizer = config.model, training.components.tokenizer
    room, stride = family.prompt_room(tokenizer), -(-len(records) // MOST_COUNTED)
    captions = [each for index in range(0, len(records), stride) for each in records[index].captions]
    if not config.data.caption_shuffle_tags:
        captions = list(possible_captions(config.data, captions))
    could_be = [caption for caption in captions if len(caption.encode()) > room]  # a token is a byte at least
    cut = sum(count > room for count in family.token_counts(tokenizer, could_be))
    part = "" if stride == 1 else f" of every {stride}th record"
    told = f"note   {cut:,} of {len(captions):,} captions{part} are longer than the {room} tokens that are read"
    return [f"{told}; model.prompt_chunks takes more of them"] if cut else []


def _count(module: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in module.parameters())
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    state = (
        "trained" if trainable == total else "frozen" if trainable == 0 else f"of which {trainable / 1e6:.3g} M trained"
    )
    return f"{total / 1e6:.3g} M {state}"


def last_word(training: Training, first: int, seconds: float, say: Say) -> None:
    state, run_dir, train = training.state, training.run_dir, training.config.train
    steps = state.step - first
    images = steps * train.global_batch_size
    rows = {
        "steps": f"{steps} ({first} -> {state.step})",
        "images": f"{images}",
        "images/s": f"{images / seconds:.4g} (start-up, saving and sampling included)",
        "wall time": duration(seconds),
        "checkpoint": str(run_dir.checkpoint(state.step)),
        "metrics": str(run_dir.metrics),
        "go on with": resume_command(training),
    }
    if cut := training.captions_cut:
        rows["cut"] = f"{cut} captions were longer than the text encoder reads; model.prompt_chunks takes more of them"
    samples = run_dir.sample(state.step)
    if samples.is_file():
        rows["samples"] = str(samples)
    for name, value in rows.items():
        say(f"  {name:11} {value}")


def resume_command(training: Training) -> str:
    """The command that goes on with this run, from the working directory of this process."""
    resolved = shlex.quote(str(training.run_dir.resolved_config))
    ranks = training.runtime.world_size
    train_py = Path(__file__).with_name("train.py")
    program = f"torchrun --nproc-per-node {ranks} {shlex.quote(str(train_py))}" if ranks > 1 else "difftrain train"
    if training.runtime.local_world_size != ranks:
        program = "the launch command of this job with"
    return f"{program} --config {resolved} --resume auto"
