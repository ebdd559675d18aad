import pytest

from shards.answers import answer_accuracy, normalise_answer


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog.", "dog"),
        ("Ten", "10"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("shouldnt've", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),
        ("yes, he is", "yes he is"),
        ("1,000", "1000"),
        ("3.5 u.s.", "3.5 us"),
        (" a\tcat\n", "cat"),
    ],
)
def test_the_official_normal_form(answer: str, normal: str) -> None:
    assert normalise_answer(answer) == normal


def test_accuracy_leaves_each_person_out_in_turn() -> None:
    answers = ["cat"] * 2 + ["a dog"] * 7 + ["Cat."]
    assert answer_accuracy("cat", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert answer_accuracy("the dog", answers) == 1
    assert answer_accuracy("bird", answers) == 0


def test_where_all_agree_letters_count() -> None:
    assert answer_accuracy("two", ["two"] * 10) == 1
    assert answer_accuracy("2", ["two"] * 10) == 0


def test_of_a_single_answer_the_normal_form_counts() -> None:
    assert answer_accuracy("The cat.", ["cat"]) == 1
    assert answer_accuracy("dog", ["cat", "a dog"]) == 1
    assert answer_accuracy("bird", ["cat", "a dog"]) == 0
