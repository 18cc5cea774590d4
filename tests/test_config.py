from __future__ import annotations

from pathlib import Path

import pytest
from config_cases import COMPLETE, Write, changed, refusal

from trainer.config import Config
from trainer.config_file import LoadedConfig, load_config

LINE_OF = {line.partition(":")[0]: number for number, line in enumerate(COMPLETE.splitlines(), 1)}


def test_the_complete_example_loads(write_config: Write):
    config = load_config(write_config(COMPLETE)).config
    assert config.model.kind == "tiny"
    assert config.data.model_dump()["data_root"] == "pictures"
    assert config.data.model_dump()["caption_column"] == "text"
    assert config.train.max_steps == 20
    assert config.train.deterministic is True
    assert config.lr.peak == 1e-4
    assert config.weighting.kind == config.timesteps.kind == "uniform"
    assert config.optimizer.kind == "adamw"
    assert config.ema is not None
    assert config.ema.decay == 0.99
    assert config.validation is None
    assert config.checkpoint.every_steps == 1


def test_without_an_output_dir_a_run_is_named_after_its_config(write_config: Write):
    assert load_config(write_config(COMPLETE, name="cats.yaml")).config.train.output_dir == str(Path("runs") / "cats")
    assert load_config(write_config(COMPLETE), output_dir="/there").config.train.output_dir == "/there"


# What is wrong with a key, and where


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_key(write_config: Write):
    path = write_config(changed(("log_every: 1", "log_evry: 1")))
    assert refusal(path) == f"config: {path}:3 train.log_evry: unknown key; did you mean `log_every`?"


def test_a_key_in_the_wrong_section_is_told_its_own(write_config: Write):
    path = write_config(changed(("{kind: epsilon}", "{kind: epsilon, max_grad_norm: 1}")))
    assert f"{path}:4 objective.max_grad_norm: unknown key; `max_grad_norm` belongs to section `train`" in refusal(path)


def test_an_unknown_section_is_refused_with_its_line(write_config: Write):
    path = write_config(changed(("checkpoint:", "checkpoints:")))
    assert f"{path}:7 checkpoints: unknown key; did you mean `checkpoint`?" in refusal(path)


def test_a_key_of_another_kind_is_refused_where_it_stands_beside_its_kind(write_config: Write):
    path = write_config(changed(("num_workers: 0", "num_images: 5")))
    assert f"{path}:2 data.num_images: unknown key" in refusal(path)


INNER = "data: {kind: mix, image_size: 32, sources: "
NESTED = {
    "in a source": (
        "[{source: {kind: imagefolder, data_root: x, max_pixel: 5}}]",
        ["0.source.max_pixel: unknown key; did you mean `max_pixels`?"],
    ),
    "in place of a required one": (
        "[{source: {kind: imagefolder, data_rot: x}}]",
        ["0.source.data_root: required, but missing", "0.source.data_rot: unknown key; did you mean `data_root`?"],
    ),
    "beside a source": ("[{source: {kind: shapes}, repeat: 2}]", ["0.repeat: unknown key; did you mean `repeats`?"]),
    "like none": (
        "[{source: {kind: shapes}}, {source: {kind: imagefolder, data_root: x, xyzzy: 1}}]",
        ["1.source.xyzzy: unknown key; known are kind, max_pixels, data_root, caption_column, image_column"],
    ),
    "in a mix in a mix": (
        "[{source: {kind: mix, sources: [{source: {kind: shapes, num_image: 9}}]}}]",
        ["0.source.sources.0.source.num_image: unknown key; did you mean `num_images`?"],
    ),
    "a kind": ("[{source: {kind: shaps}}]", ["0.source: unknown kind 'shaps'; did you mean `shapes`?"]),
    "none at all": ("[]", ["tuple should have at least 1 item"]),
}


@pytest.mark.parametrize("case", NESTED)
def test_a_fault_in_a_mix_names_the_keys_of_its_source_alone(case: str, write_config: Write):
    sources, faults = NESTED[case]
    lines = [f"{INNER}{sources}}}" if line.startswith("data:") else line for line in COMPLETE.splitlines()]
    message = refusal(write_config("\n".join(lines)))
    assert message.count("data.sources") == len(faults)
    assert all(fault in message for fault in faults), message


def test_lines_are_right_in_block_style_too(write_config: Write):
    path = write_config(changed(("lr: {kind: constant, peak: 1e-4, warmup_steps: 0}", "lr:\n  # why\n  peak: -1")))
    assert f"{path}:7 lr.peak: input should be greater than 0" in refusal(path)


def test_all_faults_are_told_at_once(write_config: Write):
    path = write_config(
        changed(
            ("kind: tiny", "kind: tyni"),
            ("max_steps: 20", "max_steps: twenty"),
            ("precision: fp32", "precision: fp8"),
            ("peak: 1e-4, ", ""),
            ("every_steps: 1,", "every_step: 1,"),
        )
    )
    message = refusal(path)
    assert message.startswith("config: 5 faults\n")
    for line, fault in (
        (1, "model"),
        (3, "train.max_steps"),
        (3, "train.precision"),
        (5, "lr.peak: required, but missing"),
        (7, "checkpoint.every_step: unknown key; did you mean `every_steps`?"),
    ):
        assert f"\n  {path}:{line} {fault}" in message


@pytest.mark.parametrize("section", ["model", "data", "train", "objective", "lr"])
def test_a_required_section_that_is_missing_is_named(section: str, write_config: Write):
    lines = [line for line in COMPLETE.splitlines() if not line.startswith(f"{section}:")]
    path = write_config("\n".join(lines))
    assert f"{section}: required, but missing" in refusal(path)


@pytest.mark.parametrize("section", ["ema", "checkpoint"])
def test_an_optional_section_may_be_missing(section: str, write_config: Write):
    lines = [line for line in COMPLETE.splitlines() if not line.startswith(f"{section}:")]
    load_config(write_config("\n".join(lines)))


def test_an_unknown_kind_is_told_the_nearest_and_all_there_are(write_config: Write):
    message = refusal(write_config(changed(("kind: epsilon", "kind: epsilom"))))
    assert "unknown kind 'epsilom'; did you mean `epsilon`?" in message
    assert message.count("flow") == 1
    message = refusal(write_config(changed(("kind: epsilon", "kind: xyz"))))
    assert message.count("flow") == 1


def test_a_wrong_kind_given_on_the_command_line_is_not_blamed_on_the_file(write_config: Write):
    message = refusal(write_config(COMPLETE), "objective.kind=flwo")
    assert "--set objective.kind=flwo" in message
    assert "did you mean `flow`?" in message


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("max_steps: 20", "max_steps: 1.5", "train.max_steps"),
        ("max_steps: 20", "max_steps: [20]", "train.max_steps"),
        ("max_steps: 20", "max_steps:", "train.max_steps"),
        ("max_steps: 20", "max_steps: 0", "greater than or equal to 1"),
        ("seed: 7", "seed: -1", "greater than or equal to 0"),
        ("seed: 7", "seed: 99999999999999999999", "train.seed"),
        ("peak: 1e-4", "peak: fast", "not 'fast'"),
        ("peak: 1e-4", "peak: .nan", "lr.peak"),
        ("peak: 1e-4", "peak: nan", "lr.peak"),
        ("peak: 1e-4", "peak: 1e999", "finite"),
        ("deterministic: true", "deterministic: maybe", "train.deterministic"),
        ("image_size: 32", "image_size: 33", "multiple of 8"),
        ("data_root: pictures", "data_root: [a]", "data.data_root"),
        ("{kind: tiny}", "tiny", "a mapping with a `kind`, not 'tiny'"),
        ("{kind: tiny}", "{}", "`kind` is missing"),
        ("ema: {decay: 0.99}", "ema: true", "ema: "),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_with_its_line(
    old: str, new: str, complaint: str, write_config: Write
):
    path = write_config(changed((old, new)))
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if new in text)
    message = refusal(path)
    assert message.startswith(f"config: {path}:{line} ")
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["max_steps: 20", "seed: 7", "log_every: 1", "peak: 1e-4", "decay: 0.99"])
def test_a_boolean_is_no_number(key: str, write_config: Write):
    name = key.partition(":")[0]
    for boolean in ("true", "false"):
        assert f".{name}: input should be a" in refusal(write_config(changed((key, f"{name}: {boolean}"))))


# --set


def test_an_override_is_typed_by_the_schema(write_config: Write):
    overrides = ["train.max_steps=1000", "lr.peak=2", "train.deterministic=false", "train.max_grad_norm=null"]
    config = load_config(write_config(COMPLETE), [*overrides, "data.data_root=no"]).config
    assert config.train.max_steps == 1000
    assert isinstance(config.lr.peak, float)
    assert config.train.deterministic is False
    assert config.train.max_grad_norm is None
    assert config.data.model_dump()["data_root"] == "no"


def test_overrides_make_sections_and_take_lists(write_config: Write):
    overrides = ["validation.every_steps=5", "validation.prompts=[a cat, 'x=1: y']", "data.data_root=a=b"]
    config = load_config(write_config(COMPLETE), overrides).config
    assert config.validation is not None
    assert config.validation.prompts == ("a cat", "x=1: y")
    assert config.data.model_dump()["data_root"] == "a=b"
    assert load_config(write_config(COMPLETE), ["ema=null"]).config.ema is None


def test_the_last_of_two_overrides_counts(write_config: Write):
    assert load_config(write_config(COMPLETE), ["train.seed=1", "train.seed=2"]).config.train.seed == 2


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("train.max_steps", "--set wants section.key=value"),
        ("=3", "--set wants section.key=value"),
        ("train..seed=3", "--set wants section.key=value"),
        ("train.max_stepz=3", "train.max_stepz: unknown key; did you mean `max_steps`?"),
        ("train.max_steps=many", "not 'many'"),
        ("train.max_steps=true", "train.max_steps: input should be a"),
        ("train.seed.x=3", "`train.seed` is not a section"),
        ("trian.seed=3", "trian: unknown key; did you mean `train`?"),
        ("train=3", "train: "),
        ("train.seed=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(override: str, complaint: str, write_config: Write):
    message = refusal(write_config(COMPLETE), override)
    assert complaint in message
    assert override in message


def test_a_whole_section_given_on_the_command_line_is_blamed_on_it(write_config: Write):
    override = "lr={kind: constant, peak: -1}"
    assert f"--set {override} lr.peak: input should be greater than 0" in refusal(write_config(COMPLETE), override)


def test_a_change_of_kind_drops_the_keys_of_the_old_kind_with_one_line(write_config: Write):
    path = write_config(changed(("num_workers: 0", "num_workers: 0, max_pixels: 100")))
    lines: list[str] = []
    config = load_config(path, ["data.kind=shapes", "data.num_images=9"], say=lines.append).config
    assert config.data.model_dump()["num_images"] == 9
    assert config.data.image_size == 32
    assert lines == ["data.kind=shapes: dropped what this kind does not have: data_root, max_pixels"]


def test_a_change_of_kind_keeps_what_the_command_line_itself_says(write_config: Write):
    message = refusal(write_config(COMPLETE), "data.kind=shapes", "data.max_pixels=3")
    assert "--set data.max_pixels=3" in message
    assert "data.max_pixels: unknown key" in message


def test_the_same_keys_written_beside_the_kind_are_an_error(write_config: Write):
    path = write_config(changed(("kind: imagefolder", "kind: shapes")))
    assert f"{path}:2 data.data_root: unknown key" in refusal(path)
    assert "data.data_root: unknown key" in refusal(path, "train.seed=1")


# The resolved config

TEXTS = [
    "no",
    "null",
    "~",
    "7",
    "007",
    "08",
    "1e-4",
    "5E3",
    "1.5e3",
    "0x1f",
    "1_0",
    "-",
    "a: b",
    "# x",
    "' \"",
    "ü \n é",
    "",
]


def test_the_resolved_config_loads_as_an_equal_one(write_config: Write):
    first = load_config(write_config(COMPLETE), ["validation.every_steps=3", "weighting.kind=min_snr"])
    again = load_config(write_config(first.config.to_yaml(), name="resolved.yaml"))
    assert again.config == first.config
    assert again.config.to_yaml() == first.config.to_yaml()


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_the_resolved_config(text: str, write_config: Write):
    first = load_config(write_config(COMPLETE)).config
    values = first.model_dump()
    values |= {"validation": {"every_steps": 1, "prompts": [text]}}
    first = Config.model_validate(values)
    again = load_config(write_config(first.to_yaml())).config
    assert again.validation is not None
    assert again.validation.prompts == (text,)


@pytest.mark.parametrize("number", [1e-4, 1e-8, 1 / 3, 1e22, 123456.789, 5e-324, 1.0])
def test_any_number_comes_back_from_the_resolved_config(number: float, write_config: Write):
    first = load_config(write_config(COMPLETE), [f"lr.peak={number!r}"]).config
    assert first.lr.peak == number
    assert load_config(write_config(first.to_yaml())).config.lr.peak == number


def test_a_loaded_config_knows_where_each_value_stands(write_config: Write):
    path = write_config(COMPLETE)
    loaded: LoadedConfig = load_config(path, ["train.seed=3"])
    assert loaded.where("train.max_steps") == f"{path}:3 train.max_steps"
    assert loaded.where("train.max_bad_steps") == f"{path}:3 train.max_bad_steps"  # a default: its section
    assert loaded.where("train.seed") == "--set train.seed=3 train.seed"


def test_every_config_of_the_project_loads():
    configs = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    assert len(configs) >= 4
    for path in configs:
        load_config(path)
