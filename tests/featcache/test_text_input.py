import pytest

from featcache.errors import ConfigError
from featcache.extract_config import FeatureOptions
from featcache.text_input import open_policy, photo_contains, picture_of


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("A dog on a mat.", "a picture of a dog on a mat."),
        ("a dog", "a picture of a dog"),
        ("TWO DOGS, ONE CAT", "a picture of two dogs, one cat"),
        ("An NBA game", "a picture of an NBA game"),
        ("A", "a picture of a"),
        ("3 DOGS", "a picture of 3 dogs"),
        ("  Spaces around \n", "a picture of spaces around"),
        ("Éclairs", "a picture of éclairs"),
        ("", "a picture of"),
        ("123", "a picture of 123"),
    ],
)
def test_picture_of_lowers_the_first_letter_or_all_of_them(caption, text):
    assert picture_of(caption) == text
    assert open_policy("picture_of")([caption, "x"]) == [text, "a picture of x"]


def test_raw_changes_nothing():
    captions = ["  A dog \n", "", "BIG"]
    policy = open_policy("raw")
    assert (policy.name, policy(captions)) == ("raw", captions)


HOOKS = """
def upper(captions):
    return [caption.upper() for caption in captions]

def phrases(captions):
    return [[word for word in caption.split() if word != "and"] for caption in captions]

def one(captions):
    return captions[:1]

def numbers(captions):
    return [3 for _ in captions]

def text(captions):
    return "".join(captions)

class Tagger:
    @staticmethod
    def run(captions):
        return captions

constant = 3
"""


@pytest.fixture
def hooks(tmp_path, monkeypatch, request):
    """Name of a module with functions of the user's; each test has its own."""
    name = f"hooks_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_function_of_the_users(hooks):
    policy = open_policy(f"{hooks}:upper")
    assert policy(["a dog", ""]) == ["A DOG", ""]
    assert policy.name.startswith(f"{hooks}:upper#")
    assert open_policy(f"{hooks}:Tagger.run")(["x"]) == ["x"]


def test_an_edited_function_is_another_policy(hooks, tmp_path):
    before = open_policy(f"{hooks}:upper").name
    assert open_policy(f"{hooks}:upper").name == before
    (tmp_path / f"{hooks}.py").write_text(HOOKS + "\n# edited\n")
    assert open_policy(f"{hooks}:upper").name != before


def test_contains_joins_the_phrases(hooks):
    policy = open_policy(f"contains:{hooks}:phrases")
    texts = policy(["dogs and cats", "and", "mat"])
    assert texts == ["The photo contains dogs, cats.", "and", "The photo contains mat."]
    assert policy.name.startswith(f"contains:{hooks}:phrases#")
    assert photo_contains(["a", "b"]) == "The photo contains a, b."


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("{}:one", "returned 1 values for 2 captions; expected a list with one string a caption"),
        ("{}:numbers", "returned int for the caption 'a b'; expected a string"),
        ("{}:text", "returned str for 2 captions"),
        ("contains:{}:one", "phrases of each of 2 captions, found 1 values"),
        ("contains:{}:upper", "returned 'A B' for the caption 'a b'; expected a list of phrases"),
        ("{}:nothing", "has no function 'nothing'"),
        ("{}:constant", "has no function 'constant'"),
        ("no_such_module_here:f", "cannot be imported .*PYTHONPATH"),
    ],
)
def test_mistakes_are_one_line(hooks, function, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_policy(function.format(hooks))(["a b", "c"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["auto", "raw", "picture_of", "a:b", "a.b_1:C.d", "contains:a:b", "contains:a.b:c"]
)
def test_names_of_policies(name):
    assert FeatureOptions(text_policy=name).text_policy == name


@pytest.mark.parametrize("name", ["contains", "contains:"])
def test_contains_wants_an_extractor(name):
    with pytest.raises(ValueError, match="contains needs a phrase extractor; give contains:MOD"):
        FeatureOptions(text_policy=name)


@pytest.mark.parametrize("name", ["", "Raw", "picture", "a:", ":b", "a b:c", "contains:a", "a:b:c"])
def test_other_names_are_refused_with_what_there_is(name):
    with pytest.raises(ValueError, match="expected auto, raw, picture_of, MODULE:FUNCTION or con"):
        FeatureOptions(text_policy=name)
