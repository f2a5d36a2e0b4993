"""Derived layouts: made once, remade when the source changes, dropped with it."""

import torch

from sab_hf.kernels import layouts


def source() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.arange(12, dtype=torch.uint8), requires_grad=False)


def counted():
    made = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    return make


def test_a_layout_is_made_once_for_all_views_of_a_storage():
    parameter, make = source(), counted()
    assert [layouts.cached("one", view, make) for view in (parameter, parameter.view(torch.uint8), parameter.data)] == [
        0,
        0,
        0,
    ]


def test_layouts_of_other_names_parts_and_storages_are_others():
    parameter, make = source(), counted()
    views = [("one", parameter), ("two", parameter), ("one", parameter[2:]), ("one", source())]
    assert [layouts.cached(name, view, make) for name, view in views] == [0, 1, 2, 3]


def test_a_layout_is_remade_after_a_write_into_its_source():
    parameter, make = source(), counted()
    layouts.cached("one", parameter, make)
    parameter.zero_()
    assert layouts.cached("one", parameter, make) == 1
    assert layouts.cached("one", parameter, make) == 1


def test_a_layout_is_dropped_with_its_source():
    parameter = source()
    before = len(layouts._CACHE)
    layouts.cached("one", parameter, lambda: "layout")
    assert len(layouts._CACHE) <= before + 1
    del parameter
    other = source()
    layouts.cached("two", other, lambda: "layout")
    assert not any(entry.storage.expired() for entry in layouts._CACHE.values())
