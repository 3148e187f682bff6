from pathlib import Path

from kitaeru.cli.quickstart import RECIPE, free_folder
from kitaeru.recipe.read import read


def test_the_packaged_recipe_is_valid_and_names_only_what_is_packaged() -> None:
    recipe = read(RECIPE).recipe
    assert recipe.model.name == "bundled"
    assert recipe.method == "lora"
    for source in (*recipe.data.train, *recipe.data.valid):
        assert Path(source.path).parent == RECIPE.parent
        assert Path(source.path).is_file()
    assert recipe.data.valid, "the quickstart shows the validation loss before and after"


def test_each_run_gets_its_own_folder(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "runs").name == "quickstart-1"
    (tmp_path / "runs" / "quickstart-1").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart-3").mkdir()
    assert free_folder(tmp_path / "runs").name == "quickstart-2"
