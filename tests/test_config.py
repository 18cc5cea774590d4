from __future__ import annotations

import ast
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import annotated_types
import pytest

import trainer
from trainer.config import Config
from trainer.config_file import LoadedConfig, load_config
from trainer.errors import UserError
from trainer.registry import NUMBERS, Part, Section

Write = Callable[..., Path]

COMPLETE = """\
model: {kind: tiny}
data: {kind: imagefolder, data_root: pictures, image_size: 32, num_workers: 0}
train: {seed: 7, max_steps: 20, precision: fp32, global_batch_size: 4, micro_batch_size: 4, log_every: 1, deterministic: true}
objective: {kind: epsilon}
lr: {kind: constant, peak: 1e-4, warmup_steps: 0}
ema: {decay: 0.99}
checkpoint: {every_steps: 1, keep_last: 3}
"""  # noqa: E501

LINE_OF = {line.partition(":")[0]: number for number, line in enumerate(COMPLETE.splitlines(), 1)}


def changed(*changes: tuple[str, str]) -> str:
    text = COMPLETE
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is not once in the config"
        text = text.replace(old, new)
    return text


def refusal(path: Path, *overrides: str) -> str:
    """The message of the one UserError that loading ends in."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


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


def test_a_config_without_an_output_dir_writes_to_a_folder_of_its_own_name(write_config: Write):
    assert load_config(write_config(COMPLETE, name="cats.yaml")).config.train.output_dir == str(Path("runs") / "cats")
    assert load_config(write_config(COMPLETE), output_dir="/there").config.train.output_dir == "/there"


# What is wrong with a key, and where


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_key(write_config: Write):
    path = write_config(changed(("log_every: 1", "log_evry: 1")))
    assert refusal(path) == f"config: {path}:3 train.log_evry: unknown key; did you mean `log_every`?"


def test_a_key_in_the_wrong_section_is_told_its_own(write_config: Write):
    path = write_config(changed(("{kind: epsilon}", "{kind: epsilon, max_grad_norm: 1}")))
    assert f"{path}:4 objective.max_grad_norm: unknown key; `max_grad_norm` belongs to section `train`" in refusal(path)


def test_an_unknown_section_is_refused_with_its_line_and_the_nearest_section(write_config: Write):
    path = write_config(changed(("checkpoint:", "checkpoints:")))
    assert f"{path}:7 checkpoints: unknown key; did you mean `checkpoint`?" in refusal(path)


def test_a_key_of_another_kind_is_refused_where_it_stands_beside_its_kind(write_config: Write):
    path = write_config(changed(("num_workers: 0", "num_images: 5")))
    assert f"{path}:2 data.num_images: unknown key" in refusal(path)


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


# YAML as people mean it


def test_a_number_without_a_dot_may_have_an_exponent(write_config: Write):
    for written in ("1e-3", "1E-3", "1.e-3", ".001", "+1e-3"):
        assert load_config(write_config(changed(("peak: 1e-4", f"peak: {written}")))).config.lr.peak == 1e-3


@pytest.mark.parametrize(
    "text", ["no", "off", "on", "y", "yes", "12:30", "2020-01-01", "café", "a b", "'1e-4'", "'007'"]
)
def test_text_stays_the_text_that_it_is(text: str, write_config: Write):
    config = load_config(write_config(changed(("data_root: pictures", f"data_root: {text}")))).config
    assert config.data.model_dump()["data_root"] == text.strip("'")


@pytest.mark.parametrize("text", ["007", "1e-4", "1_000", "0x10", "1.50"])
def test_text_that_looks_like_a_number_is_taken_as_written_or_refused(text: str, write_config: Write):
    """A commit of digits or a folder named `1e-4` must not silently become another one."""
    path = write_config(changed(("data_root: pictures", f"data_root: {text}")))
    try:
        config = load_config(path).config
    except UserError:
        return
    assert config.data.model_dump()["data_root"] == text


def test_a_key_given_twice_is_refused_with_both_lines(write_config: Write):
    path = write_config(COMPLETE + "train:\n  max_steps: 3\n  seed: 1\n")
    message = refusal(path)
    assert "`train` stands here a second time" in message
    assert f"{path}:8" in message
    assert "the first is on line 3" in message
    path = write_config("train:\n  seed: 1\n  max_steps: 3\n  seed: 2\n")
    message = refusal(path)
    assert "`train.seed` stands here a second time" in message
    assert f"{path}:4" in message
    assert "the first is on line 2" in message


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path):
    plain, windows = tmp_path / "a" / "c.yaml", tmp_path / "b" / "c.yaml"
    for path, content in (
        (plain, COMPLETE.encode()),
        (windows, b"\xef\xbb\xbf" + COMPLETE.replace("\n", "\r\n").encode()),
    ):
        path.parent.mkdir()
        path.write_bytes(content)
    assert load_config(windows).config == load_config(plain).config
    windows.write_bytes(b"\xef\xbb\xbf" + changed(("seed: 7", "sed: 7")).replace("\n", "\r\n").encode())
    assert f"{windows}:3 train.sed: unknown key; did you mean `seed`?" in refusal(windows)


def test_an_alias_repeats_a_value(write_config: Write):
    text = changed(("seed: 7", "seed: &n 7"), ("keep_last: 3", "keep_last: *n"))
    assert load_config(write_config(text)).config.checkpoint.keep_last == 7


# Files that are no config


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "- model\n- data\n", "model\n", "7\n"])
def test_a_file_that_is_no_mapping_is_refused(text: str, write_config: Write):
    path = write_config(text)
    message = refusal(path)
    assert message.startswith("a config is a mapping of sections")
    assert str(path) in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (COMPLETE.encode("utf-16"), "not UTF-8"),
        (b"model: {kind: t\xefny}\n", "not UTF-8"),
        (b"\0\0\0\0", "not valid YAML"),
        (b"a: [1,\n", "not valid YAML"),
        (b"a:\n\tb: 1\n", "not valid YAML"),
        (b"a: *b\n", "undefined alias"),
        (b"a: 1\n---\nb: 2\n", "another document"),
        (b"a: !!python/object/apply:os.getcwd []\n", "config"),
        (b"a: 1\nb: !mine x\n", "tag !mine is not allowed"),
        (b"? [a]\n: 1\n", "a key must be plain text"),
    ],
)
def test_a_file_that_is_no_yaml_of_ours_is_refused(content: bytes, complaint: str, tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert complaint in message
    assert str(path) in message


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BOMB, id="a billion by aliases"),
        pytest.param("a: &a [*a]\n", id="a list in itself"),
        pytest.param("a: &a {b: *a}\n", id="a mapping in itself"),
        pytest.param("model: " + "[" * 3000, id="lists that never close"),
        pytest.param("model: " + "{a: " * 3000 + "1" + "}" * 3000, id="3000 levels"),
        pytest.param("- " * 3000 + "x", id="3000 levels in block style"),
        pytest.param("a: [" + "x," * 100_000 + "]", id="100,000 items"),
    ],
)
def test_a_file_that_would_grow_or_nest_without_end_is_refused_quickly(text: str, write_config: Write):
    path = write_config(text)
    started = time.process_time()
    message = refusal(path)
    assert time.process_time() - started < 5
    assert str(path) in message
    assert len(message) < 1000


def test_a_file_of_more_than_a_megabyte_is_refused_unread(write_config: Write):
    assert "1000001 bytes are too many" in refusal(write_config("#" * 1_000_001))


def test_a_config_that_is_not_there_is_refused_with_the_nearest_name(tmp_path: Path, write_config: Write):
    path = write_config(COMPLETE, name="cats.yaml")
    message = refusal(tmp_path / "cat.yaml")
    assert "No such file" in message
    assert f"did you mean {path}?" in message
    assert "Is a directory" in refusal(tmp_path)


# --set


def test_an_override_is_typed_by_the_schema(write_config: Write):
    overrides = ["train.max_steps=1000", "lr.peak=2", "train.deterministic=false", "train.max_grad_norm=null"]
    config = load_config(write_config(COMPLETE), [*overrides, "data.data_root=no"]).config
    assert config.train.max_steps == 1000
    assert isinstance(config.lr.peak, float)
    assert config.train.deterministic is False
    assert config.train.max_grad_norm is None
    assert config.data.model_dump()["data_root"] == "no"


def test_overrides_make_sections_and_take_lists_and_values_with_equals_signs(write_config: Write):
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


# The fields themselves


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Every section of the config and every kind of it, with the name of the section."""
    yield "", Config
    for name, field in Config.model_fields.items():
        options = [field.annotation, *typing.get_args(field.annotation)]
        for option in options:
            if isinstance(option, type) and issubclass(option, Part):
                yield from ((name, part) for part in option.kinds().values())
            elif isinstance(option, type) and issubclass(option, Section):
                yield name, option


def test_every_field_says_what_it_means():
    for name, section in sections():
        for key, field in section.model_fields.items():
            if section is Config and key != "plugins" and key != "hooks":
                continue  # a section, which says it itself
            assert field.description, f"{name}.{key} of {section.__name__} has no description"
            assert field.description.endswith("."), f"{name}.{key}: {field.description!r}"


UNBOUNDED = {"LogitNormal.mean": "a logit is any number"}


def test_every_number_has_a_lower_bound_or_a_reason_to_have_none():
    seen = set()
    for _, section in sections():
        for key, field in section.model_fields.items():
            if field.annotation not in NUMBERS:
                continue
            seen.add(f"{section.__name__}.{key}")
            bounded = any(isinstance(each, annotated_types.Ge | annotated_types.Gt) for each in field.metadata)
            assert bounded or f"{section.__name__}.{key}" in UNBOUNDED, f"{section.__name__}.{key} takes any number"
    assert set(UNBOUNDED) <= seen
    assert len(seen) > 30


# Under which names the code holds a section, beside the section's own name.
HELD_AS = {"model": {"family"}, "data": {"source"}, "ema": {"spec"}, "": {"config"}}
READ_OTHERWISE = {"Config.plugins": "read from the mapping itself, before there are classes to validate with"}


class Reads(ast.NodeVisitor):
    """(holder, field) of each attribute that is read, where `self` counts as the class around it."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self.unpacked: dict[str, set[str]] = {}  # holder -> classes made by Class(**holder.model_dump())
        self._class = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        self.generic_visit(node)
        self._class = outer

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found.add((self._holder(node.value), node.attr))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            match keyword:
                case ast.keyword(arg=None, value=ast.Call(func=ast.Attribute(attr="model_dump", value=value))):
                    self.unpacked.setdefault(self._holder(value), set()).add(self._holder(node.func))
        self.generic_visit(node)

    def _holder(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id="self"):
                return f"class {self._class}"
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name
        return ""


def test_every_field_is_read_somewhere():
    reads = Reads()
    for path in Path(trainer.__file__).parent.rglob("*.py"):
        reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    unread = []
    for name, section in sections():
        holders = {name, *HELD_AS.get(name, ())}
        classes = {base.__name__ for base in section.__mro__ if issubclass(base, Section)}
        classes |= {made for holder in holders for made in reads.unpacked.get(holder, ())}
        holders |= {f"class {each}" for each in classes}
        unread += [
            f"{section.__name__}.{key}"
            for key in section.model_fields
            if not any((holder, key) in reads.found for holder in holders)
        ]
    assert set(unread) == set(READ_OTHERWISE)
