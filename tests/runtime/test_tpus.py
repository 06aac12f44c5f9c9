"""Slices by name: sizes, hosts, accelerator types, and mistakes with the nearest name."""

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.runtime.tpus import CHIPS, STEP_OPTIONS, slice_of, slices_of, step_options


@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts", "accelerator"),
    [
        ("v5e:2x4", 8, 8, 1, "v5litepod-8"),
        ("v5e:16x16", 256, 256, 64, "v5litepod-256"),
        ("v5p:2x2x1", 4, 4, 1, "v5p-8"),
        ("v5p:4x4x4", 64, 64, 16, "v5p-128"),
        ("v5p:4x4x12", 192, 192, 48, "v5p-384"),
        ("v6e:1x1", 1, 1, 1, "v6e-1"),
        ("V6E:4x4", 16, 16, 4, "v6e-16"),
        ("tpu7x:4x4x4", 64, 128, 16, "tpu7x-128"),
    ],
)
def test_a_slice_has_the_size_its_name_says(name, chips, devices, hosts, accelerator):
    found = slice_of(name)
    assert (found.chips, found.devices, found.hosts, found.accelerator) == (
        chips,
        devices,
        hosts,
        accelerator,
    )
    assert slice_of(found.name) == found


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v5x:4x4x4", "did you mean v5"),
        ("v5litepod:2x4", "did you mean v5e?"),
        ("ironwood:4x4x4", "did you mean tpu7x?"),
        ("v7x:4x4x4", "did you mean tpu7x?"),
        (
            "v5p-128",
            "'v5p-128' names a slice by its number of cores; expected its topology, v5p:4x4x4",
        ),
        ("v5litepod-64", "by its number of chips; expected its topology, v5e:8x8"),
        ("v5e-64", "expected its topology, v5e:8x8"),
        ("v6e-16", "by its number of chips; expected its topology, v6e:4x4"),
        ("tpu7x-128", "by its number of cores; expected its topology, tpu7x:4x4x4"),
        ("v5p-100", "did you mean v5p?"),  # there is no such slice
        ("v4", "'v4' is of TPU v4, which is not supported; expected one of v5e, v5p, v6e, tpu7x"),
        ("v4-128", "TPU v4, which is not supported"),
        ("v3-8", "TPU v3, which is not supported"),
        ("v2:4x4", "TPU v2, which is not supported"),
        ("h100:8", "expected one of v5e, v5p, v6e, tpu7x"),
        ("v5p", "expected v5p: and one of 2x2x1"),
        ("v5p:", "expected v5p: and one of 2x2x1"),
        ("v5p:4x4xfour", "is no topology"),
        ("v5p:4x4", "the nearest is v5p:2x2x4"),
        ("v6e:4x2", "the nearest is v6e:2x4"),
        ("v5e:32x32", "the nearest is v5e:16x16"),
        ("v5p:64x64x64", "the nearest is v5p:16x16x24"),
        ("v5p:0x4x4", "is no topology"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused_with_the_nearest(name, hint):
    with pytest.raises(UserError) as error:
        slice_of(name)
    assert hint in str(error.value) and "\n" not in str(error.value)


def test_the_slices_of_a_type_grow():
    for kind in CHIPS:
        sizes = [each.chips for each in slices_of(kind)]
        assert sizes == sorted(set(sizes)) and sizes[-1] <= CHIPS[kind].largest


def test_links_add_up_to_what_the_pages_give():
    assert CHIPS["v5p"].link_gbs == 100  # three dimensions, two neighbours in each, both ways: 1200
    assert CHIPS["v5e"].link_gbs == 50


def test_a_step_s_options_are_for_tpus_and_give_way_to_the_user_s_own(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert step_options("cpu") == step_options("gpu") == {}
    assert step_options("tpu") == STEP_OPTIONS
    first, *others = STEP_OPTIONS
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{first}=true --xla_tpu_other=1")
    assert step_options("tpu") == {name: STEP_OPTIONS[name] for name in others}
