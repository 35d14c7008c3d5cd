"""What is left of the name of a model or a text for others to read."""

import pytest

from llmmpq.names import model_name, shortened, text_name, without_places


@pytest.mark.parametrize(
    ("name", "model", "text"),
    [
        ("user/base", "user/base", "base"),
        ("demo", "demo", "demo"),
        ("/home/ada/base", "base", "base"),
        ("~/base", "base", "base"),
        ("./base", "base", "base"),
        ("../base/", "base", "base"),
        ("models/ada/base", "base", "base"),
        ("C:\\ada\\base", "base", "base"),
        (".", ".", "."),
        ("hf:user/text:train", "hf:user/text:train", "hf:user/text:train"),
    ],
)
def test_a_name_loses_its_folders(name, model, text):
    assert (model_name(name), text_name(name)) == (model, text)


def test_every_place_that_a_folder_names_is_found():
    provenance = {"model": "./ada/base", "calibration": {"source": "secret/x.txt"}, "probe": None}
    recipe = {"model": "./ada/base", "evaluation": {"text": "~/held.txt"}, "calibration": {"source": "builtin"}}
    places = shortened(provenance, recipe)
    assert places == {"./ada/base": "base", "secret/x.txt": "x.txt", "~/held.txt": "held.txt"}
    sentence = "secret/x.txt and top-secret/x.txt of ./ada/base/sub"
    assert without_places({"a": [sentence, 1, None]}, places) == {
        "a": ["x.txt and top-secret/x.txt of base/sub", 1, None]
    }
