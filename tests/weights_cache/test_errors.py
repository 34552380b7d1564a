"""Every error of weights_cache is one sentence and a next step, whatever its data are."""

import dataclasses
from pathlib import Path

import pytest

from weights_cache import errors
from weights_cache.errors import WeightsError

ODD = "a{0}b{path}%s{"


def subclasses(kind: type) -> list[type]:
    return [each for below in kind.__subclasses__() for each in (below, *subclasses(below))]


def filled(kind: type[WeightsError]) -> WeightsError:
    """An error all of whose texts have what a template would take for its own."""
    samples = {"Path": Path(ODD), "Sequence[str]": [ODD], "tuple[int, ...]": (1, 2), "int": 3, "bool": True}
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(*(samples.get(getattr(field.type, "__name__", str(field.type)), ODD) for field in fields))


@pytest.mark.parametrize("kind", subclasses(WeightsError), ids=lambda kind: kind.__name__)
def test_an_error_is_a_sentence_and_a_next_step_that_show_data_as_they_are(kind: type[WeightsError]):
    error = filled(kind)
    assert str(error).endswith(".") and "\n" not in str(error)
    assert error.hint
    assert ODD in str(error) + error.hint or kind is errors.TensorShapeMismatch
