"""Recipes: what they may say, and the one sentence for what they may not."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import pytest

from pykd.errors import RecipeError
from pykd.quantization import SCHEMES
from pykd.recipe import load_recipe, recipe_hash, recipe_yaml
from pykd.recipe.train import Train
from pykd.training import TrainConfig

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

GOOD: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "digits", "image_size": 8, "test_size": 40},
    "teacher": {"source": "torchvision", "name": "resnet18", "train": {"max_steps": 2}},
    "student": {"width": 0.5},
    "stages": [
        {"distill": {"max_steps": 2}},
        {"prune": {"method": "channels", "sparsity": 0.3}},
        {"quantize": {"scheme": "w4a16"}},
    ],
}


def changed(key: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    place: Any = content
    *steps, last = [int(step) if step.isdigit() else step for step in key.split("/")]
    for step in steps:
        place = place[step]
    place[last] = value
    return content


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_come_back_from_yaml(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    recipe = load_recipe(path)
    copy_of = tmp_path / "copy.yaml"
    copy_of.write_text(recipe_yaml(recipe), encoding="utf-8")
    assert load_recipe(copy_of) == recipe
    assert recipe_hash(load_recipe(copy_of)) == recipe_hash(recipe)
    assert recipe_hash(load_recipe(path, short=True)) != recipe_hash(recipe)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_accepted(scheme: str) -> None:
    quantized = load_recipe(changed("stages/2/quantize/scheme", scheme)).stages[2].quantize
    assert quantized is not None and quantized.scheme == scheme


def test_a_recipe_is_read_from_a_mapping_a_file_and_itself() -> None:
    recipe = load_recipe(GOOD)
    assert recipe.stages[1].kind == "prune"
    assert recipe.student is not None and recipe.student.derived
    assert load_recipe(recipe) is recipe
    assert load_recipe(recipe, overrides=["seed=3"]).seed == 3
    assert recipe.seed == 0


def test_train_has_the_fields_of_train_config() -> None:
    # The recipe's section and the loop's settings are one list, in two forms: they must not drift apart.
    ours = {name: field.default for name, field in Train.model_fields.items()}
    theirs = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name != "seed"}
    assert ours == theirs


def test_overrides_reach_every_kind_of_place() -> None:
    settings = [
        "data.image_size=16",
        "stages[1].prune.sparsity=0.6",
        "teacher.train.lr=2e-3",
        "student={name: mobilenet_v2}",
    ]
    recipe = load_recipe(GOOD, overrides=[*settings, "evaluate.batch_size=8"])
    assert recipe.data.kind == "digits" and recipe.data.image_size == 16
    assert recipe.stages[1].prune is not None and recipe.stages[1].prune.sparsity == 0.6
    assert recipe.teacher.train is not None and recipe.teacher.train.lr == 2e-3
    assert recipe.student is not None and recipe.student.name == "mobilenet_v2"
    assert recipe.evaluate.batch_size == 8


def test_short_settings_apply_before_overrides() -> None:
    content = {**GOOD, "short": {"teacher.train.max_steps": 1, "seed": 5}}
    recipe = load_recipe(content, short=True, overrides=["seed=6"])
    assert recipe.teacher.train is not None and recipe.teacher.train.max_steps == 1
    assert recipe.seed == 6


def test_the_hash_is_of_what_is_computed() -> None:
    assert recipe_hash(load_recipe({**GOOD, "description": "other words"})) == recipe_hash(load_recipe(GOOD))
    assert recipe_hash(load_recipe({**GOOD, "seed": 1})) != recipe_hash(load_recipe(GOOD))
    chain = {
        **{k: v for k, v in GOOD.items() if k != "student"},
        "stages": [{"chain": {"students": {"a": {"width": 0.5}}}}],
    }
    studies = [{"weights": {"quality": 1.0}}, {"weights": {"quality": 0.5}}, {"explain": 4}]
    hashes = [recipe_hash(load_recipe({**chain, "study": study})) for study in studies]
    assert hashes[0] == hashes[1] != hashes[2]  # weights judge what was computed


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (
            "stages/2/quantize/scheme",
            "w4a61",
            r"stages\[2\]\.quantize\.scheme: unknown scheme 'w4a61': did you mean 'w4a16'",
        ),
        (
            "stages/2/quantize/embeddings",
            "w8a8",
            r"stages\[2\]\.quantize\.embeddings: unknown scheme for embeddings 'w8a8': did you mean 'w8a16'",
        ),
        (
            "stages/2/quantize/method",
            "gtpq",
            r"stages\[2\]\.quantize\.method: unknown method 'gtpq': did you mean 'gptq'",
        ),
        (
            "stages/2/quantize",
            {"scheme": "mixed"},
            r"stages\[2\]\.quantize: scheme 'mixed' and its budget `bits` go together, got 'mixed' and None",
        ),
        (
            "stages/2",
            {"compress_to": {"epochs": 1}},
            r"stages\[2\]\.compress_to: a target is one or more of size_mb, ratio, .*, got none",
        ),
        (
            "stages/2",
            {"compress_to": {"ratio": 4, "schemes": ["w4a61"]}},
            r"stages\[2\]\.compress_to: unknown scheme 'w4a61': did you mean 'w4a16'",
        ),
        ("stages/2/quantize/samples", 0, r"stages\[2\]\.quantize\.samples: input should be greater than or equal to 1"),
        (
            "stages/2/quantize",
            {"scheme": "w8a8", "method": "gptq"},
            r"stages\[2\]\.quantize: method 'gptq' chooses 4-bit codes, and scheme 'w8a8' has none: use method='rtn'",
        ),
        (
            "stages/2/quantize",
            {"scheme": "nf4", "symmetric": False},
            r"stages\[2\]\.quantize: symmetric=False stores zero points of schemes 'w4a16' and 'w4a8', got .* 'nf4'",
        ),
        (
            "stages/1/prune/method",
            "chanels",
            r"stages\[1\]\.prune\.method: unknown method 'chanels': did you mean 'channels'",
        ),
        ("stages/1/prune/sparsty", 0.5, r"stages\[1\]\.prune\.sparsty: unknown key 'sparsty': did you mean 'sparsity'"),
        ("stages/0", {"distil": {}}, r"stages\[0\]\.distil: unknown key 'distil': did you mean 'distill'\?"),
        ("teacher/trian", {}, r"teacher\.trian: unknown key 'trian': did you mean 'train'\?"),
        ("data/image_sise", 8, r"data\.image_sise: unknown key 'image_sise': did you mean 'image_size'\?"),
        ("stagess", [], r"stagess: unknown key 'stagess': did you mean 'stages'\?"),
        ("stages/1/prune/sparsity", 1.0, r"stages\[1\]\.prune\.sparsity: input should be less than 1, got 1.0"),
        ("stages/1", {}, r"stages\[1\]: a stage is one of distill, .* qat, compress_to, but this one names none"),
        ("stages/1", {"prune": {}, "quantize": {}}, r"stages\[1\]: a stage is one of .* names prune, quantize"),
        ("stages/1", "prune", r"stages\[1\]: expected a section of keys, got 'prune'"),
        ("stages", [], r"stages: list should have at least 1 item"),
        ("teacher/train/lr", -1, r"teacher\.train: lr must be a finite number above 0, got -1"),
        ("teacher/source", "torchvison", r"teacher\.source: .*'torchvision' or 'huggingface', got 'torchvison'"),
        ("teacher", {"name": "resnet18"}, r"teacher: source is missing"),
        ("teacher", {"source": "torchvision"}, r"teacher: name is missing"),
        ("teacher", {"source": "huggingface", "config": {"model_type": "vit"}}, r"teacher: a teacher from scratch"),
        ("student", {"width": 0.5, "name": "resnet18"}, r"student: say where the student comes from, in one way"),
        ("teacher/revision", "v1", r"teacher\.revision is not read by torchvision: leave it out"),
        ("student", {"source": "huggingface", "name": "x", "weights": "a.pt"}, r"student\.weights is not read by hug"),
        ("student", {}, r"student: say where the student comes from"),
        ("student", None, r"stages\[0\]\.distill needs a student"),
        (
            "student",
            {"router": {}, "depth": 2},
            r"student: a student with a router is made of the teacher's layers: leave the other keys out",
        ),
        ("student", {"router": {"expert": 2}}, r"student\.router\.expert: unknown key 'expert': did you mean 'expe"),
        ("student", {"router": {"experts": 1}}, r"student\.router: each token goes through 2 of 1 experts: lower exp"),
        ("stages/1", {"calibrate": {}}, r"stages\[1\]\.calibrate needs a student with a router"),
        ("data", {"image_size": 8}, r"data\.kind: the key is missing: one of digits, text, tokens, pairs, language"),
        ("data/kind", "digit", r"data\.kind: unknown kind 'digit': did you mean 'digits'\?"),
        ("data", {"kind": "text"}, r"data\.path: the key is missing"),
        ("name", "../up", r"name: string should match pattern"),
    ],
)  # fmt: skip
def test_one_sentence_with_the_path_of_the_key(key: str, value: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=f"^recipe: {sentence}"):
        load_recipe(changed(key, value))


def test_quantized_weights_cannot_be_trained_on() -> None:
    content = {**GOOD, "stages": [{"quantize": {}}, {"recover": {}}]}
    with pytest.raises(RecipeError, match=r"stages\[1\]\.recover comes after stages\[0\]\.quantize, .* move quantize"):
        load_recipe(content)
    content = {**GOOD, "stages": [{"qat": {}}, {"recover": {}}]}
    with pytest.raises(RecipeError, match=r"stages\[1\]\.recover comes after stages\[0\]\.qat, .* move qat to the end"):
        load_recipe(content)
    assert load_recipe({**GOOD, "stages": [{"qat": {"scheme": scheme}} for scheme in ("bf16", "w8a16", "w4a16")]})
    assert load_recipe({**GOOD, "stages": [{"qat": {"scheme": "nf4"}}, {"quantize": {"embeddings": "w8a16"}}]}).stages


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"scheme": "w4a61"},
            r"stages\[0\]\.qat\.scheme: unknown scheme for .* training 'w4a61': did you mean 'w4a16'",
        ),
        (
            {"scheme": "nf4", "symmetric": False},
            r"stages\[0\]\.qat: symmetric=False stores zero points of schemes 'w4a16'",
        ),
        ({"search_every": 0}, r"stages\[0\]\.qat\.search_every: input should be greater than or equal to 1"),
        ({"alpha": 2}, r"stages\[0\]\.qat\.alpha: input should be less than or equal to 1"),
    ],
)
def test_what_a_qat_stage_refuses(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe({**GOOD, "stages": [{"qat": settings}]})


def test_a_bare_stage_has_its_defaults_and_none_is_kept() -> None:
    recipe = load_recipe({**GOOD, "stages": [{"distill": {"clip_norm": None}}, {"recover": None}]})
    assert recipe.stages[1].recover is not None and recipe.stages[1].recover.epochs == 0.5
    assert "clip_norm: null" in recipe_yaml(recipe)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(RecipeError, match=r"teacher: the key is missing; the section's keys are name, "):
        load_recipe({key: value for key, value in GOOD.items() if key != "teacher"})


def test_several_mistakes_are_counted_and_an_unknown_key_comes_first() -> None:
    content = {**GOOD, "seed": -1, "sed": 3}
    with pytest.raises(RecipeError, match=r"sed: unknown key 'sed': did you mean 'seed'\? .* \(and 1 more\)$"):
        load_recipe(content)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("seed", r"--set seed: expected key=value, for instance --set data\.path"),
        ("stages[9].prune.sparsity=1", r"there is no entry \[9\], the recipe has 3 entries there"),
        ("data[0]=1", r"there is no entry \[0\], the recipe has no list there"),
        ("name.first=1", r"'first' would be a key of 'tiny', which is not a section"),
        ("a..b=1", r"--set a\.\.b: not a path of keys"),
        ("seed=[1", r"--set seed: not valid YAML"),
        ("sed=1", r"recipe: sed: unknown key 'sed': did you mean 'seed'\?"),
    ],
)
def test_wrong_settings(setting: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(GOOD, overrides=[setting])


def test_wrong_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file .*recipes/"):
        load_recipe(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.yaml: it is not a text file"):
        load_recipe(binary)
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: tiny\nstages: [1,\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"broken\.yaml: not valid YAML in line 3"):
        load_recipe(broken)
    listed = tmp_path / "listed.yaml"
    listed.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"listed\.yaml: a recipe is a mapping of keys, got list"):
        load_recipe(listed)


def test_short_needs_its_section() -> None:
    with pytest.raises(RecipeError, match=r"recipe: --short needs a section `short`"):
        load_recipe(GOOD, short=True)


def test_prune_takes_a_pattern_as_yaml_reads_it_and_refuses_what_the_method_does_not_read() -> None:
    read = load_recipe(GOOD, overrides=["stages[1].prune={pattern: 2:4, method: wanda}"])
    assert read.stages[1].prune is not None and read.stages[1].prune.pattern == "2:4"
    for setting, sentence in (
        ("{method: heads, pattern: 2:4}", r"stages\[1\]\.prune: pattern says which single weights go together"),
        ("{method: wnada}", r"stages\[1\]\.prune\.method: unknown method 'wnada': did you mean 'wanda'"),
        ("{scope: rows}", r"stages\[1\]\.prune: unknown scope 'rows': did you mean 'row'"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(GOOD, overrides=[f"stages[1].prune={setting}"])


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ("[{chain: {students: {a: {depth: 1}}, teachers: [{name: x}]}}]", r"chain does not read teachers: put it"),
        ("[{compress_to: {ratio: 2, guard: {}, teacher_weight: 2}}]", r"to does not read guard and teacher_weight: "),
        ("[{quantize: {candidates: [w8a16]}}]", r"quantize: candidates are what scheme 'mixed' chooses from, got .*w4"),
    ],
)
def test_keys_that_a_stage_would_not_read_are_refused(stages: str, sentence: str) -> None:
    content = {key: value for key, value in GOOD.items() if key != "student"}
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(content, overrides=[f"stages={stages}"])


@pytest.mark.parametrize(
    ("study", "sentence"),
    [
        (
            {"weights": {"explanations": 0.1}},
            r"study: study\.weights\.explanations needs explanations: set study\.expl",
        ),
        ({"weights": {"quality": 0, "speed": 0, "size": 0}}, r"study: study\.weights: at least one weight must be"),
        ({"explain": 2}, r"study\.explain compares the attributions of classifiers, data\.kind is 'tokens'"),
    ],
)
def test_a_study_that_could_not_be_ranked_is_refused_before_it_trains(study: Any, sentence: str) -> None:
    stages = [{"chain": {"students": {"a": {"depth": 1}}}}]
    content = {key: value for key, value in GOOD.items() if key != "student"} | {"stages": stages, "study": study}
    if "explain" in study:
        assert load_recipe(content).study is not None
        content["data"] = {"kind": "tokens", "path": "rows.jsonl"}
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(content)


def test_a_threshold_is_drawn_for_a_router_that_learns() -> None:
    for routing in ("fast", "deep"):
        student = {"router": {"routing": routing}}
        with pytest.raises(RecipeError, match=r"stages\[1\]\.calibrate needs a student with a router that learns"):
            load_recipe({**GOOD, "student": student, "stages": [{"distill": {}}, {"calibrate": {}}]})


def test_gradual_pruning_is_a_part_of_a_training() -> None:
    read = load_recipe(GOOD, overrides=["stages[0].distill.gradual={method: movement, pattern: 2:4}"])
    assert read.stages[0].distill is not None and read.stages[0].distill.gradual is not None
    gradual = read.stages[0].distill.gradual.gradual(seed=3)
    assert (gradual.method, gradual.pattern, gradual.seed, gradual.end) == ("movement", "2:4", 3, 0.7)
    for setting, sentence in (
        (
            "distill={gradual: {method: movment}}",
            r"unknown method of gradual pruning 'movment': did you mean 'movement'",
        ),
        ("distill={gradual: {sparsty: 0.5}}", r"unknown key 'sparsty': did you mean 'sparsity'"),
        (
            "compress_to={ratio: 2, gradual: {}}",
            r"stages\[0\]\.compress_to does not read gradual: put it under distill or recover",
        ),
    ):
        stage = GOOD if setting.startswith("distill") else {**GOOD, "stages": [{}]}
        with pytest.raises(RecipeError, match=sentence):
            load_recipe(stage, overrides=[f"stages[0].{setting}"])
