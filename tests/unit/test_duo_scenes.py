"""Scenes of two objects: what the captions and answers say is looked up again in the pixels, and the parser reads it back."""

import itertools

import pytest
import torch

from robustvlm_lite.runtime import UserError, generator
from robustvlm_lite.scenes import duo
from robustvlm_lite.scenes.duo import Duo, ask, duo_vocabulary, parse, sample_duos, slots_right


@pytest.fixture(scope="module")
def drawn():
    return sample_duos(300, generator("duo"))


def painted(image, color):
    """Which pixels [S, S] are of this color, up to shading and the blended rim."""
    wanted = torch.tensor(duo.PAINTS[color]).view(3, 1, 1)
    return ((image - 0.97 * wanted).abs() < 0.06).all(0)


def center(mask):
    rows, columns = torch.nonzero(mask, as_tuple=True)
    return columns.float().mean().item(), rows.float().mean().item()


def test_the_relation_of_a_caption_is_where_its_colors_lie(drawn):
    checked = 0
    for image, scene in zip(drawn.pixels(), drawn.duos, strict=True):
        first, second = painted(image, scene.first[1]), painted(image, scene.second[1])
        if scene.first[1] == scene.second[1] or min(first.sum(), second.sum()) < 8:
            continue  # one color twice, or a thing too thin to find again
        (ax, ay), (bx, by) = center(first), center(second)
        assert ax < bx
        assert scene.relation == ("left of" if bx - ax > abs(by - ay) else "above" if ay < by else "below")
        checked += 1
    assert checked > 200


def test_big_things_are_bigger_than_small_ones(drawn):
    areas = {"small": [], "big": []}
    for image, scene in zip(drawn.pixels(), drawn.duos, strict=True):
        if scene.first[1] != scene.second[1]:
            for size, color, shape in (scene.first, scene.second):
                if shape == "circle":
                    areas[size].append(painted(image, color).sum().item())
    assert max(areas["small"]) < min(areas["big"])


def test_one_generator_state_draws_one_set_of_scenes():
    one, same, other = (sample_duos(9, generator("g", k)) for k in (1, 1, 2))
    assert torch.equal(one.images, same.images) and one.duos == same.duos
    assert not torch.equal(one.images, other.images)
    assert one.images.dtype == torch.uint8 and one.pixels().amin() >= 0 and one.pixels().amax() <= 1


@pytest.mark.parametrize("n, size", [(0, 64), (4, 16)])
def test_impossible_scenes_are_refused(n, size):
    with pytest.raises(UserError, match="at least 32 pixels"):
        sample_duos(n, generator(0), size=size)


def test_the_parser_reads_every_caption_of_the_world():
    things = list(itertools.product(duo.SIZES, list(duo.PAINTS)[:3] + ["teal"], duo.SHAPES))
    for first, second in itertools.product(things, things):
        for relation in duo.RELATIONS:
            scene = Duo(first, relation, second)
            assert parse(scene.caption()) == scene.slots


def test_both_orders_of_a_relation_are_the_same_scene():
    assert parse("a small red circle above a big blue star") == parse("a big blue star below a small red circle")
    assert parse("a small red circle left of a big blue star") == parse("A big blue star right of a small red circle ")
    assert parse("a small red circle left of a big blue star") != parse("a small red circle right of a big blue star")


def test_garbage_is_wrong_in_every_slot_and_never_an_exception():
    words = [*duo_vocabulary(), "zebra", "", "of"]
    said = ["", " ", "a", "a photo of a thing"]
    for k in range(500):
        chosen = torch.randint(len(words), (k % 14,), generator=generator("garbage", k))
        said.append(" ".join(words[i] for i in chosen))
    truth = Duo(("small", "red", "circle"), "above", ("big", "blue", "star"))
    right = slots_right(said, [truth] * len(said))
    assert right.shape == (len(said), 7) and not right.any()


def test_slots_are_counted_one_by_one():
    truth = Duo(("small", "red", "circle"), "above", ("big", "blue", "star"))
    said = ["a small red circle above a big blue star", "a big red circle left of a big blue heart"]
    assert slots_right(said, [truth, truth]).tolist() == [[True] * 7, [False, True, True, False, True, True, False]]
    with pytest.raises(UserError, match="one caption a scene"):
        slots_right(said, [truth])


def answer(scene, question):
    """The answer from the question's words, written apart from `Duo.questions`."""
    words = question.split()
    if words[0] == "what":
        thing = scene.first if words[4] in (scene.relation, "left") else scene.second
        return thing[("size", "color", "shape").index(words[1])]
    if words[0] == "is":
        return "yes" if words[3] in scene.first + scene.second else "no"
    slot = ("size", "color", "shape").index(words[5])
    return "yes" if scene.first[slot] == scene.second[slot] else "no"


def test_questions_have_their_true_answers_and_known_words(drawn):
    known = set(duo_vocabulary())
    for scene in drawn.duos[:60]:
        assert set(scene.caption().split()) <= known
        for question, said in scene.questions():  # "left" asks for the first, and so does the relation's own word
            assert said == answer(scene, question)
            assert {*question.split(), said} <= known
            assert not ("left" in question and scene.relation == "above")  # no place that the scene does not have


def test_a_kind_of_question_is_what_was_asked_for(drawn):
    kinds = ["what", "yes", "no"] * 100
    asked = ask(drawn.duos, kinds, generator("ask"))
    for scene, kind, (question, said) in zip(drawn.duos, kinds, asked, strict=True):
        assert said == answer(scene, question)
        assert (said if kind != "what" else question.split()[0]) == kind
    assert len({question for question, _ in asked}) > 25
