from __future__ import annotations

import pytest
import yaml

from preceptor.errors import UserError
from preceptor.recipe import differences, dump_recipe, known_keys, recipe_names, recipe_text, validate
from preceptor.tasks import load_recipe, recipe_from
from preceptor.vqa.config import VqaRecipe


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_come_back(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    again = validate(yaml.safe_load(dump_recipe(recipe)), "again", type(recipe))
    assert again == recipe
    assert "#" in recipe_text(name)[0]


def test_overrides_are_yaml_and_nested():
    recipe = load_recipe(
        "mhkd-demo",
        [
            "student.train.learning_rate=1e-4",
            "data.root=null",
            "method.hidden.layers=[[0, 2]]",
            "data.augment.enabled=false",
            "student.train.clip_norm=null",
            "data.name=vqa_rad",
            "output=somewhere",
        ],
    )
    assert recipe.student.train.learning_rate == 1e-4
    assert recipe.method.hidden.layers == [(0, 2)]
    assert not recipe.data.augment.enabled
    assert recipe.student.train.clip_norm is None
    assert recipe.data.name == "vqa-rad"
    assert str(recipe.output_folder) == "somewhere"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("studnet.train.epochs=3", r"unknown key 'studnet'; did you mean 'student'\?"),
        ("student.train.epoch=3", r"unknown key 'student\.train\.epoch'; did you mean 'student\.train\.epochs'\?"),
        ("student.train.epochs=-1", r"key student\.train\.epochs: .*greater than 0 \(got -1\)"),
        ("data.name=vqa-med", r"key data\.name"),
        ("data.augment=yes please", r"key data\.augment"),
        ("student.model.width=65", r"width 65 is not a multiple of heads 2"),
        ("method.teaching.kind=cached data.augment.views=0", None),
        (
            "student.model.vision={package: nosuch}",
            r"vision\.package'; known: student\.model\.vision\.arguments, ",
        ),
        ("method={name: kd, alhpa: 1}", r"unknown key 'method\.alhpa'; did you mean 'method\.alpha'\?"),
        (
            "method={name: kd, hidden: {}}",
            r"'method\.hidden', which belongs to method\.name=mhkd, not to kd; re",
        ),
        ("method.name=kd", r"replace the section with method=\{name: kd\}"),
        ("student.epochs=3", r"did you mean 'student\.train\.epochs'\?"),
        ("data.zq=3", r"unknown key 'data\.zq'; (did you mean 'data\.|known: data\.)"),
        ("qqqq=3", r"known: allow_downloads, data, description, method, name, output, report, resume, seed, stages, "),
        ("seed=-1", r"key seed: .*greater than or equal to 0 \(got -1\)"),
        ("student.train.epochs=.inf", r"key student\.train\.epochs: .*finite number"),
        ("student.train.learning_rate=.nan", r"key student\.train\.learning_rate"),
        ("method.hidden.layers=unifrom", r"key method\.hidden\.layers: .*'uniform' or 'last' \(got 'unifrom'\)"),
        ("student.train.epochs=", r"key student\.train\.epochs: .*valid number"),
        ("data.root=[", r"override 'data\.root=\[' is not valid YAML"),
        ("epochs", r"'epochs' must look like key\.sub=value"),
        ("stages=[]", r"at least one stage"),
        ("stages=[distilled]", r"need method\.teaching\.runs"),
        (
            "data.image_size=19",
            r"image_size=19 is too small for the 4 stages of student\.model\.vision\.conv: use at least 20, or",
        ),
        ("teacher.model.vision.conv.channels=[8]", r"channels has 1 stages, blocks has 4"),
    ],
)
def test_mistakes_name_the_key_and_the_fix(override, message):
    if message is None:
        with pytest.raises(UserError, match=r"needs data\.augment\.views of 1 or more"):
            load_recipe("mhkd-demo", override.split())
        return
    with pytest.raises(UserError, match=message):
        load_recipe("mhkd-demo", [override])


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("runs/{name}-2", "runs/mhkd-demo-2"),
        ("runs/{nmae}", "runs/{nmae}"),
        ("2024", "2024"),
        ("1e5", "1e5"),
        ("{", "{"),
    ],
)
def test_any_name_of_a_folder_is_taken_as_it_is(text, folder):
    recipe = yaml.safe_load(recipe_text("mhkd-demo")[0])
    assert str(recipe_from({**recipe, "output": text}, "x").output_folder) == folder
    if text not in ("{", "runs/{nmae}"):  # which are no texts in YAML
        assert str(load_recipe("mhkd-demo", [f"output={text}"]).output_folder) == folder


def test_the_home_folder_is_found_where_no_shell_expands_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = load_recipe("mhkd-demo", ["output=~/runs", "data.root=~/data"])
    assert (str(recipe.output_folder), recipe.data.root) == ("/home/somebody/runs", "/home/somebody/data")


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path):
    shared = "{model: {width: 64}, train: {epochs: 3, batch_size: 8}}"
    (tmp_path / "x.yaml").write_text(f"task: vqa\nname: x\nteacher: &model {shared}\nstudent: *model\n")
    recipe = load_recipe(str(tmp_path / "x.yaml"), ["student.train.epochs=5", "student.train.batch_size=16"])
    assert (recipe.teacher.train.epochs, recipe.teacher.train.batch_size) == (3, 8)
    assert (recipe.student.train.epochs, recipe.student.train.batch_size, recipe.student.model.width) == (5, 16, 64)


def test_an_exponent_is_a_number_wherever_it_stands():
    recipe = load_recipe("mhkd-demo", ["student.train={learning_rate: 1e-4, clip_norm: 1e-2}"])
    assert (recipe.student.train.learning_rate, recipe.student.train.clip_norm) == (1e-4, 1e-2)


def test_recipes_that_are_not_there_or_no_recipes(tmp_path):
    with pytest.raises(UserError, match="did you mean 'mhkd-demo'"):
        load_recipe("mkhd-demo")
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe(str(tmp_path / "no.yaml"))
    for text, message in (
        ("[1, 2]", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("!!python/object:os.x {}", "YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(str(tmp_path / "bad.yaml"))
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_a_run_folder_is_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump_recipe(load_recipe("mhkd-demo", ["seed=7"])))
    assert load_recipe(str(tmp_path)).seed == 7


def test_differences_are_listed_by_leaf():
    old = VqaRecipe(name="x").model_dump(mode="json")
    new = load_recipe("mhkd-demo", ["seed=3"]).model_dump(mode="json")
    found = differences(old, new)
    assert "seed: 0 -> 3" in found
    assert differences(old, old) == []
    assert any(line.startswith("data.image_size: 112 -> 64") for line in found)


def test_known_keys_reach_the_leaves():
    assert {"student.train.epochs", "method.hidden.layers", "data.phantom.cases"} <= set(known_keys(VqaRecipe))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.cross_modal.wieght=1", "did you mean 'method.cross_modal.weight'"),
        ("stages=[baseline, baseline]", "each once"),
        ("data.modalities=[t1, t1]", "each once"),
        ("method.election.initial=ct", "not among data.modalities"),
        ("stages=[distilled]", "needs the stage 'teacher'"),
        ("stages=[distilled, teacher]", "needs the stage 'teacher' before 'distilled'"),
        ("method.name=lckdd", "did you mean .lckd."),
    ],
)
def test_wrong_segmentation_recipes(override, said):
    with pytest.raises(UserError, match=said):
        load_recipe("lckd-demo", [override])


@pytest.mark.parametrize("stages", ["[distilled]", "[teacher, distilled]", "[distilled, baseline]"])
def test_self_training_needs_its_baseline_first(stages):
    with pytest.raises(UserError, match="needs the stage 'baseline' before 'distilled'"):
        load_recipe("kd-brats-cubes-few-masks", [f"stages={stages}"])


@pytest.mark.parametrize(
    ("first_line", "message"),
    [
        ("name: x", "lacks the key 'task': one of vqa, segmentation, grounding"),
        ("task: segmentaton", r"key task: 'segmentaton' is not known; did you mean 'segmentation'\?"),
        ("task: segmentation\nteacher: {}", "unknown key 'teacher'"),
        ("task: {a: 1}", "key task: {'a': 1} is not known"),
    ],
)
def test_a_recipe_names_its_task(tmp_path, first_line, message):
    (tmp_path / "x.yaml").write_text(first_line)
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "x.yaml"))


def test_of_many_mistakes_the_first_are_named_and_the_others_counted(tmp_path):
    keys = "\n".join(f"  wrong_{number}: 1" for number in range(12))
    (tmp_path / "x.yaml").write_text(f"task: vqa\nname: x\nteacher:\n{keys}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "x.yaml"))
    assert str(caught.value).count("unknown key") == 4
    assert str(caught.value).endswith("; and 8 more mistakes")


@pytest.mark.parametrize("name", [name for name in recipe_names() if "kd-" in name and load_recipe(name).task == "vqa"])
def test_recipes_teach_from_a_cache_if_their_views_are_finite(name):
    recipe = load_recipe(name)
    assert recipe.method.teaching.kind == ("cached" if recipe.data.augment.repeats else "online")


def test_endless_views_are_refused_only_if_a_stage_needs_the_cache():
    recipe = load_recipe("mhkd-demo", ["stages=[teacher,baseline]", "data.augment.views=0"])
    assert recipe.method.teaching.kind == "cached"
